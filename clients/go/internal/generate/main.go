// Generate compiles the API's .proto file and runs the Go plugins on it: what protoc or buf would do, from Go modules alone.
//
//	vm.proto ── protocompile ──► descriptors ──► protoc-gen-go, protoc-gen-connect-go ──► gen/vmm/v1/…
//
// Usage, in the module's folder: go run ./internal/generate PROTO_FOLDER FILE
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

// go_package begins with the module's name, so the files land where the imports look for them.
const module = "vmm-controlplane"

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: generate PROTO_FOLDER FILE (for example: ../../proto vmm/v1/vm.proto)")
		os.Exit(2)
	}
	if err := generate(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func generate(folder, file string) error {
	request, err := request(folder, file)
	if err != nil {
		return err
	}
	for _, plugin := range []string{"protoc-gen-go", "protoc-gen-connect-go"} {
		if err := run(plugin, request); err != nil {
			return fmt.Errorf("%s: %w", plugin, err)
		}
	}
	return nil
}

// request compiles the file into what plugins read.
func request(folder, file string) ([]byte, error) {
	compiler := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{folder}}),
		SourceInfoMode: protocompile.SourceInfoStandard,
	}
	files, err := compiler.Compile(context.Background(), file)
	if err != nil {
		return nil, err
	}
	return proto.Marshal(&pluginpb.CodeGeneratorRequest{
		FileToGenerate: []string{file},
		Parameter:      proto.String("module=" + module),
		ProtoFile:      withImports(nil, files[0], map[string]bool{}),
	})
}

// withImports appends a file to done, after those it imports: the order that plugins rely on.
func withImports(
	done []*descriptorpb.FileDescriptorProto, file protoreflect.FileDescriptor, seen map[string]bool,
) []*descriptorpb.FileDescriptorProto {
	if seen[file.Path()] {
		return done
	}
	seen[file.Path()] = true
	for i := range file.Imports().Len() {
		done = withImports(done, file.Imports().Get(i).FileDescriptor, seen)
	}
	return append(done, protoutil.ProtoFromFileDescriptor(file))
}

// run gives one plugin the request and writes the files that it answers with.
func run(plugin string, request []byte) error {
	var output bytes.Buffer
	command := exec.Command("go", "tool", plugin)
	command.Stdin, command.Stdout, command.Stderr = bytes.NewReader(request), &output, os.Stderr
	if err := command.Run(); err != nil {
		return err
	}
	response := &pluginpb.CodeGeneratorResponse{}
	if err := proto.Unmarshal(output.Bytes(), response); err != nil {
		return err
	}
	if response.Error != nil {
		return errors.New(response.GetError())
	}
	for _, file := range response.File {
		if err := os.MkdirAll(filepath.Dir(file.GetName()), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file.GetName(), []byte(file.GetContent()), 0o644); err != nil {
			return err
		}
	}
	return nil
}
