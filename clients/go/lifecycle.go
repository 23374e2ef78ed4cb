package main

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	vmmv1 "vmm-controlplane/gen/vmm/v1"
	"vmm-controlplane/gen/vmm/v1/vmmv1connect"
)

const memory = 128 << 20

// life takes one VM from its creation to its deletion.
type life struct {
	client vmmv1connect.VmServiceClient
	id     string
	kernel string
}

// answer has the common fields of the answers of all operations that change a state.
type answer interface {
	GetSuccess() bool
	GetState() vmmv1.VmState
}

// expect checks the answer of one step.
func expect[T any, P interface {
	*T
	answer
}](step string, state vmmv1.VmState, response *connect.Response[T], err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", step, err)
	}
	if message := P(response.Msg); !message.GetSuccess() || message.GetState() != state {
		return fmt.Errorf("%s: success %t, state %s; %s was expected", step, message.GetSuccess(), message.GetState(), state)
	}
	return nil
}

// refused checks that a step failed with this code, and with a message.
func refused(step string, code connect.Code, err error) error {
	if failure := new(connect.Error); !errors.As(err, &failure) || failure.Code() != code || failure.Message() == "" {
		return fmt.Errorf("%s: %v; a failure with code %s was expected", step, err, code)
	}
	return nil
}

func (l life) create(ctx context.Context) error {
	response, err := l.client.CreateVm(ctx, connect.NewRequest(&vmmv1.CreateVmRequest{VmId: l.id, Config: &vmmv1.VmConfig{
		Cpu:      &vmmv1.CpuConfig{VcpuCount: 1},
		Memory:   &vmmv1.MemoryConfig{SizeBytes: memory},
		Boot:     &vmmv1.BootConfig{KernelPath: l.kernel},
		Metadata: map[string]string{"made_by": l.id},
	}}))
	if err != nil {
		return fmt.Errorf("CreateVm: %w", err)
	}
	if response.Msg.VmId != l.id || response.Msg.State != vmmv1.VmState_VM_STATE_CREATED {
		return fmt.Errorf("CreateVm: %v", response.Msg)
	}
	return nil
}

// look reads the VM by both reads.
func (l life) look(ctx context.Context, state vmmv1.VmState) error {
	info, err := l.client.GetVmInfo(ctx, connect.NewRequest(&vmmv1.GetVmInfoRequest{VmId: l.id}))
	if err != nil {
		return fmt.Errorf("GetVmInfo: %w", err)
	}
	config := info.Msg.Config
	if info.Msg.State != state || config.GetMemory().GetSizeBytes() != memory || config.GetBoot().GetKernelPath() != l.kernel {
		return fmt.Errorf("GetVmInfo: %v", info.Msg)
	}
	list, err := l.client.ListVms(ctx, connect.NewRequest(&vmmv1.ListVmsRequest{
		StateFilter:    []vmmv1.VmState{state},
		MetadataFilter: map[string]string{"made_by": l.id},
	}))
	if err != nil {
		return fmt.Errorf("ListVms: %w", err)
	}
	if len(list.Msg.Vms) != 1 || list.Msg.TotalCount != 1 || list.Msg.Vms[0].VmId != l.id || list.Msg.Vms[0].State != state {
		return fmt.Errorf("ListVms: %v", list.Msg)
	}
	return nil
}

// run makes every step, and stops at the first that fails.
func (l life) run(ctx context.Context) error {
	const running, shutdown = vmmv1.VmState_VM_STATE_RUNNING, vmmv1.VmState_VM_STATE_SHUTDOWN
	boot := func() error {
		response, err := l.client.BootVm(ctx, connect.NewRequest(&vmmv1.BootVmRequest{VmId: l.id}))
		return expect("BootVm", running, response, err)
	}
	pause := func() (*connect.Response[vmmv1.PauseVmResponse], error) {
		return l.client.PauseVm(ctx, connect.NewRequest(&vmmv1.PauseVmRequest{VmId: l.id}))
	}
	steps := []func() error{
		// Step 1: CreateVm records the VM.
		func() error { return l.create(ctx) },
		func() error { return l.look(ctx, vmmv1.VmState_VM_STATE_CREATED) },
		// Step 2: PauseVm is refused before the boot.
		func() error {
			_, err := pause()
			return refused("PauseVm before the boot", connect.CodeFailedPrecondition, err)
		},
		// Step 3: BootVm starts the guest.
		boot,
		// Step 4: BootVm of a running VM has nothing to do.
		boot,
		func() error { return l.look(ctx, running) },
		// Step 5: PauseVm stops the guest's processors.
		func() error {
			response, err := pause()
			return expect("PauseVm", vmmv1.VmState_VM_STATE_PAUSED, response, err)
		},
		// Step 6: ResumeVm starts the processors again.
		func() error {
			response, err := l.client.ResumeVm(ctx, connect.NewRequest(&vmmv1.ResumeVmRequest{VmId: l.id}))
			return expect("ResumeVm", running, response, err)
		},
		// Step 7: RebootVm starts the guest anew.
		func() error {
			response, err := l.client.RebootVm(ctx, connect.NewRequest(&vmmv1.RebootVmRequest{VmId: l.id, Force: true}))
			return expect("RebootVm", running, response, err)
		},
		// Step 8: ShutdownVm ends the guest.
		func() error {
			response, err := l.client.ShutdownVm(ctx, connect.NewRequest(&vmmv1.ShutdownVmRequest{VmId: l.id, Force: true}))
			return expect("ShutdownVm", shutdown, response, err)
		},
		func() error { return l.look(ctx, shutdown) },
		// Step 9: BootVm starts the guest again.
		boot,
		// Step 10: DeleteVm of a running VM is refused without force.
		func() error {
			_, err := l.client.DeleteVm(ctx, connect.NewRequest(&vmmv1.DeleteVmRequest{VmId: l.id}))
			return refused("DeleteVm of a running VM", connect.CodeFailedPrecondition, err)
		},
		// Step 11: DeleteVm with force removes the VM.
		func() error { return l.delete(ctx) },
		// Step 12: GetVmInfo does not find the VM.
		func() error {
			_, err := l.client.GetVmInfo(ctx, connect.NewRequest(&vmmv1.GetVmInfoRequest{VmId: l.id}))
			return refused("GetVmInfo after DeleteVm", connect.CodeNotFound, err)
		},
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (l life) delete(ctx context.Context) error {
	response, err := l.client.DeleteVm(ctx, connect.NewRequest(&vmmv1.DeleteVmRequest{VmId: l.id, Force: true}))
	if err != nil {
		return fmt.Errorf("DeleteVm: %w", err)
	}
	if !response.Msg.Success {
		return errors.New("DeleteVm: no success")
	}
	return nil
}
