package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"
	vmmv1 "vmm-controlplane/gen/vmm/v1"
)

// console reads the console of a guest from its first message on, types a line, and reads the guest's echo. The stream
// must end without an error when the VM is deleted.
func console(ctx context.Context, dialect dialect, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client, _ := dialect.connectTo(address)

	// Step 1: BootVm starts a guest that echoes its input.
	guest := life{client: client, id: "go-console", kernel: os.Getenv("VMCP_TEST_ECHO_KERNEL")}
	if err := guest.create(ctx); err != nil {
		return err
	}
	defer func() { _ = guest.delete(context.WithoutCancel(ctx)) }()
	if _, err := client.BootVm(ctx, connect.NewRequest(&vmmv1.BootVmRequest{VmId: guest.id})); err != nil {
		return err
	}

	// Step 2: StreamConsole sends the output from the first message on.
	stream, err := client.StreamConsole(ctx, connect.NewRequest(&vmmv1.StreamConsoleRequest{VmId: guest.id, Follow: true}))
	if err != nil {
		return err
	}
	defer func() { _ = stream.Close() }()
	var output []byte
	until := func(text string) error {
		for !bytes.Contains(output, []byte(text)) {
			if !stream.Receive() {
				return fmt.Errorf("%q did not come before the end of the stream: %q, %w", text, output, stream.Err())
			}
			output = append(output, stream.Msg().Data...)
		}
		return nil
	}
	if err := until("kind=echo"); err != nil {
		return err
	}

	// Step 3: WriteConsole types a line, and the guest echoes the line.
	line := &vmmv1.WriteConsoleRequest{VmId: guest.id, Data: []byte("hello from Go\r")}
	if _, err := client.WriteConsole(ctx, connect.NewRequest(line)); err != nil {
		return err
	}
	if err := until("hello from Go"); err != nil {
		return err
	}

	// Step 4: DeleteVm ends the stream, without an error.
	if err := guest.delete(ctx); err != nil {
		return err
	}
	for stream.Receive() {
	}
	if err := stream.Err(); err != nil {
		return fmt.Errorf("the end of the VM is an error of the stream: %w", err)
	}
	return nil
}
