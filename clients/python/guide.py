"""The migration guide's Python example: its imports and its request. Only the address is a parameter."""

import requests
import os


def create_vm(address: str) -> requests.Response:
    # Set backend (optional, defaults to cloudhypervisor)
    os.environ["UNKEY_VMCP_BACKEND"] = "cloudhypervisor"

    # New unified API
    response = requests.post(
        f"{address}/vmm.v1.VmService/CreateVm",  # Updated endpoint
        json={
            "config": {
                "cpu": {"vcpu_count": 2},
                "memory": {"size_bytes": 2147483648}
            }
        }
    )
    return response
