"""Tests the API from Python: the migration guide's example, plain JSON, and gRPC.

The environment says where the daemon is (VMCP_TEST_URL) and which kernel is its default (VMCP_TEST_KERNEL).
"""

import guide
import with_grpc
import with_json
from checks import KERNEL, URL, check, equal, finish
from console import console
from lifecycle import lifecycle
from watch import watch


def guide_example() -> None:
    """Runs the migration guide's example and looks at what it made."""
    response = guide.create_vm(URL.replace("127.0.0.1", "localhost"))  # the name that the guide uses
    equal(response.status_code, 200)
    vm_id = response.json()["vm_id"]
    try:
        equal((vm_id[:3], response.json()["state"]), ("vm-", "VM_STATE_CREATED"))
        config = with_json.call("GetVmInfo", vm_id=vm_id)[1]["config"]
        found = (config["cpu"]["vcpu_count"], config["memory"]["size_bytes"], config["boot"]["kernel_path"])
        equal(found, (2, "2147483648", KERNEL))
    finally:
        with_json.call("DeleteVm", vm_id=vm_id, force=True)


check("guide: requests.post", guide_example)
check("lifecycle over JSON with urllib", with_json.lifecycle)
check("violations over JSON with urllib", with_json.violations)
check("lifecycle over gRPC", lifecycle)
check("a watch over gRPC", watch)
check("a console over gRPC", console)
check("violations over gRPC", with_grpc.violations)
check("more violations over gRPC than metadata has room for", with_grpc.many_violations)
check("answers over gRPC that are larger than a client takes", with_grpc.large_answers)
check("more waits on one gRPC connection than the usual limit", with_grpc.many_waits)
check("gRPC health", with_grpc.health)
check("gRPC reflection, v1alpha", with_grpc.reflection)
finish()
