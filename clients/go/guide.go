package main

import (
	"context"
	"net/http"

	"connectrpc.com/connect"
	vmmv1 "vmm-controlplane/gen/vmm/v1"
	"vmm-controlplane/gen/vmm/v1/vmmv1connect"
)

// createVM is the migration guide's Go example: its imports, its client and its request. Only the address is a parameter.
func createVM(address string) (*connect.Response[vmmv1.CreateVmResponse], error) {
	client := vmmv1connect.NewVmServiceClient(
		http.DefaultClient,
		address,
	)

	req := &vmmv1.CreateVmRequest{
		Config: &vmmv1.VmConfig{
			Cpu: &vmmv1.CpuConfig{
				VcpuCount: 2,
			},
			Memory: &vmmv1.MemoryConfig{
				SizeBytes: 2 * 1024 * 1024 * 1024,
			},
		},
	}

	return client.CreateVm(context.Background(), connect.NewRequest(req))
}
