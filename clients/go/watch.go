package main

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"
	vmmv1 "vmm-controlplane/gen/vmm/v1"
)

// watch reads the present states, then each change as it is made.
func watch(ctx context.Context, dialect dialect, address, id, kernel string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	client, _ := dialect.connectTo(address)
	stream, err := client.WatchVms(ctx, connect.NewRequest(&vmmv1.WatchVmsRequest{}))
	if err != nil {
		return err
	}
	defer func() { _ = stream.Close() }()
	until := func(kind, of string) error {
		for stream.Receive() {
			if event := stream.Msg(); event.Type == kind && event.VmId == of {
				return nil
			}
		}
		return fmt.Errorf("the stream ended before the event %q: %w", kind, stream.Err())
	}

	// Step 1: WatchVms sends the present states, then the event "synced".
	if err := until("synced", ""); err != nil {
		return err
	}

	// Step 2: CreateVm is the event "created".
	watched := life{client, id, kernel}
	if err := watched.create(ctx); err != nil {
		return err
	}
	if err := until("created", id); err != nil {
		return err
	}

	// Step 3: DeleteVm is the event "deleted".
	if err := watched.delete(ctx); err != nil {
		return err
	}
	return until("deleted", id)
}
