// The program tests the API from Go, over every protocol of connect-go.
//
// The environment gives the daemon's address (VMCP_TEST_URL) and its default kernel (VMCP_TEST_KERNEL). The program
// prints "ok NAME" or "FAIL NAME: WHY", and ends with status 1 if something failed.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	vmmv1 "vmm-controlplane/gen/vmm/v1"
)

func main() {
	address, kernel := os.Getenv("VMCP_TEST_URL"), os.Getenv("VMCP_TEST_KERNEL")
	if address == "" || kernel == "" {
		fmt.Fprintln(os.Stderr, "VMCP_TEST_URL and VMCP_TEST_KERNEL are not set; run clients/go/test.sh")
		os.Exit(2)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()

	failed := false
	report := func(name string, err error) {
		if err != nil {
			failed = true
			fmt.Printf("FAIL %s: %v\n", name, err)
			return
		}
		fmt.Println("ok", name)
	}
	// The id that the guide uses.
	report("guide: createVM", guide(ctx, strings.Replace(address, "127.0.0.1", "localhost", 1), kernel))
	for i, dialect := range dialects() {
		client, recorder := dialect.connectTo(address)
		report("lifecycle over "+dialect.name, life{client, fmt.Sprintf("go-%d", i), kernel}.run(ctx))
		report("a watch over "+dialect.name, watch(ctx, dialect, address, fmt.Sprintf("go-watch-%d", i), kernel))
		report("a console over "+dialect.name, console(ctx, dialect, address))
		report("violations over "+dialect.name, violations(ctx, dialect, address))
		report("many violations over "+dialect.name, manyViolations(ctx, dialect, address, kernel))
		report("it was "+dialect.name, dialect.proveSpoken(recorder))
	}
	for _, dialect := range dialects()[:3] {
		report("reads by GET over "+dialect.name, readsByGet(ctx, dialect, address))
	}
	if failed {
		os.Exit(1)
	}
}

// guide runs the migration guide's example and looks at what it made.
func guide(ctx context.Context, address, kernel string) error {
	response, err := createVM(address)
	if err != nil {
		return err
	}
	client, _ := dialects()[0].connectTo(address)
	created := life{client: client, id: response.Msg.VmId}
	defer func() { _ = created.delete(ctx) }()
	if !strings.HasPrefix(created.id, "vm-") || response.Msg.State != vmmv1.VmState_VM_STATE_CREATED {
		return fmt.Errorf("unexpected answer: %v", response.Msg)
	}
	info, err := client.GetVmInfo(ctx, connect.NewRequest(&vmmv1.GetVmInfoRequest{VmId: created.id}))
	if err != nil {
		return err
	}
	config := info.Msg.Config
	if config.Cpu.VcpuCount != 2 || config.Memory.SizeBytes != 2<<30 || config.Boot.KernelPath != kernel {
		return fmt.Errorf("unexpected configuration: %v", config)
	}
	return created.delete(ctx)
}

// violations sends two mistakes at once and reads them back from the error's google.rpc.BadRequest.
func violations(ctx context.Context, dialect dialect, address string) error {
	client, _ := dialect.connectTo(address)
	_, err := client.CreateVm(ctx, connect.NewRequest(&vmmv1.CreateVmRequest{Config: &vmmv1.VmConfig{
		Cpu:    &vmmv1.CpuConfig{VcpuCount: -1},
		Memory: &vmmv1.MemoryConfig{SizeBytes: 1000},
	}}))
	if err := refused("CreateVm with mistakes", connect.CodeInvalidArgument, err); err != nil {
		return err
	}
	failure := new(connect.Error)
	errors.As(err, &failure)
	var fields []string
	for _, detail := range failure.Details() {
		value, err := detail.Value()
		if err != nil {
			return fmt.Errorf("a detail does not decode: %w", err)
		}
		if request, ok := value.(*errdetails.BadRequest); ok {
			for _, violation := range request.FieldViolations {
				fields = append(fields, violation.Field)
			}
		}
	}
	for _, wanted := range []string{"config.cpu.vcpu_count", "config.memory.size_bytes"} {
		if !slices.Contains(fields, wanted) || !strings.Contains(failure.Message(), wanted) {
			return fmt.Errorf("%s is not named in the details %v and the message %q", wanted, fields, failure.Message())
		}
	}
	return nil
}

// manyViolations names 64 disks that do not exist: the error must fit into the metadata that clients accept.
func manyViolations(ctx context.Context, dialect dialect, address, kernel string) error {
	client, _ := dialect.connectTo(address)
	var disks []*vmmv1.StorageDevice
	for number := range 64 {
		disks = append(disks, &vmmv1.StorageDevice{Path: fmt.Sprintf("/srv/disks/of-the-tests/disk-%d.img", number)})
	}
	_, err := client.CreateVm(ctx, connect.NewRequest(&vmmv1.CreateVmRequest{Config: &vmmv1.VmConfig{
		Cpu:     &vmmv1.CpuConfig{VcpuCount: 1},
		Memory:  &vmmv1.MemoryConfig{SizeBytes: memory},
		Boot:    &vmmv1.BootConfig{KernelPath: kernel},
		Storage: disks,
	}}))
	if err := refused("CreateVm with 64 wrong disks", connect.CodeInvalidArgument, err); err != nil {
		return err
	}
	failure := new(connect.Error)
	errors.As(err, &failure)
	size := 0
	for name, values := range failure.Meta() {
		for _, value := range values {
			size += len(name) + len(value) + 32
		}
	}
	if size > 8192 || len(failure.Details()) != 1 || !strings.Contains(failure.Message(), "more, shown when these are corrected") {
		return fmt.Errorf("%d bytes of metadata, %d details, message %q", size, len(failure.Details()), failure.Message())
	}
	return nil
}

// readsByGet makes both reads, and fails unless they went as GET.
func readsByGet(ctx context.Context, dialect dialect, address string) error {
	plain, _ := dialect.connectTo(address)
	created, err := plain.CreateVm(ctx, connect.NewRequest(&vmmv1.CreateVmRequest{Config: &vmmv1.VmConfig{
		Cpu: &vmmv1.CpuConfig{VcpuCount: 1}, Memory: &vmmv1.MemoryConfig{SizeBytes: memory},
	}}))
	if err != nil {
		return err
	}
	made := life{client: plain, id: created.Msg.VmId}
	defer func() { _ = made.delete(ctx) }()

	client, recorder := dialect.connectTo(address, connect.WithHTTPGet())
	info, err := client.GetVmInfo(ctx, connect.NewRequest(&vmmv1.GetVmInfoRequest{VmId: made.id}))
	if err != nil {
		return err
	}
	list, err := client.ListVms(ctx, connect.NewRequest(&vmmv1.ListVmsRequest{
		StateFilter: []vmmv1.VmState{vmmv1.VmState_VM_STATE_CREATED},
	}))
	if err != nil {
		return err
	}
	if info.Msg.VmId != made.id || list.Msg.TotalCount < 1 {
		return fmt.Errorf("unexpected answers: %v; %v", info.Msg, list.Msg)
	}
	gets := 0
	for call, times := range recorder.seen {
		if strings.HasPrefix(call, "GET ") {
			gets += times
		}
	}
	if gets != 2 {
		return fmt.Errorf("2 calls by GET were expected: %v", recorder.seen)
	}
	return made.delete(ctx)
}
