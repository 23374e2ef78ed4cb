module vmm-controlplane

go 1.24.0

require (
	connectrpc.com/connect v1.19.2
	github.com/bufbuild/protocompile v0.14.1
	google.golang.org/genproto/googleapis/rpc v0.0.0-20250324211829-b45e905df463
	google.golang.org/protobuf v1.36.11
)

require golang.org/x/sync v0.8.0 // indirect

tool (
	connectrpc.com/connect/cmd/protoc-gen-connect-go
	google.golang.org/protobuf/cmd/protoc-gen-go
)
