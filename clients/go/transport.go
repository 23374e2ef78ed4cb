package main

import (
	"fmt"
	"net/http"
	"strings"
	"sync"

	"connectrpc.com/connect"
	"vmm-controlplane/gen/vmm/v1/vmmv1connect"
)

// dialect is one protocol with its encoding.
type dialect struct {
	name string
	// http2 is true for cleartext HTTP/2 with prior knowledge, and false for HTTP/1.1.
	http2   bool
	options []connect.ClientOption
	// contentType is the type that unary calls must have sent, so that each test proves its dialect. The answer's begins
	// with it: gRPC allows "application/grpc+proto" for "application/grpc".
	contentType string
}

func dialects() []dialect {
	json, grpc, web := connect.WithProtoJSON(), connect.WithGRPC(), connect.WithGRPCWeb()
	return []dialect{
		{"connect binary, HTTP/1.1", false, nil, "application/proto"},
		{"connect JSON, HTTP/1.1", false, []connect.ClientOption{json}, "application/json"},
		{"connect binary, h2c", true, nil, "application/proto"},
		{"gRPC, h2c", true, []connect.ClientOption{grpc}, "application/grpc"},
		{"gRPC JSON, h2c", true, []connect.ClientOption{grpc, json}, "application/grpc+json"},
		{"gRPC-Web, HTTP/1.1", false, []connect.ClientOption{web}, "application/grpc-web+proto"},
	}
}

// recorder is an HTTP client that records the form of its calls.
type recorder struct {
	client *http.Client
	mutex  sync.Mutex
	// seen counts calls by "VERB HTTP/version request's content type → answer's content type".
	seen map[string]int
}

func newRecorder(http2 bool) *recorder {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)
	return &recorder{client: &http.Client{Transport: &http.Transport{Protocols: protocols}}, seen: map[string]int{}}
}

func (r *recorder) Do(request *http.Request) (*http.Response, error) {
	response, err := r.client.Do(request)
	if err == nil {
		key := fmt.Sprintf("%s HTTP/%d %s → %s", request.Method, response.ProtoMajor,
			request.Header.Get("Content-Type"), response.Header.Get("Content-Type"))
		r.mutex.Lock()
		r.seen[key]++
		r.mutex.Unlock()
	}
	return response, err
}

// connectTo makes a client of this dialect.
func (d dialect) connectTo(address string, more ...connect.ClientOption) (vmmv1connect.VmServiceClient, *recorder) {
	recorder := newRecorder(d.http2)
	options := append(append([]connect.ClientOption{}, d.options...), more...)
	return vmmv1connect.NewVmServiceClient(recorder, address, options...), recorder
}

// proveSpoken fails unless a call was made in this dialect.
func (d dialect) proveSpoken(recorder *recorder) error {
	version := 1
	if d.http2 {
		version = 2
	}
	wanted := fmt.Sprintf("POST HTTP/%d %s → %s", version, d.contentType, d.contentType)
	for call := range recorder.seen {
		if strings.HasPrefix(call, wanted) {
			return nil
		}
	}
	return fmt.Errorf("no call was %q, but: %v", wanted, recorder.seen)
}
