"""Tests the API as JSON over HTTP, with only the standard library."""

import json
import urllib.error
import urllib.request

from checks import KERNEL, MEMORY, URL, equal


def call(method: str, **request: object) -> tuple[int, dict]:
    """Calls one method; returns the HTTP status and the answer."""
    http = urllib.request.Request(
        f"{URL}/vmm.v1.VmService/{method}",
        data=json.dumps(request).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(http, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def expect(method: str, state: str, **request: object) -> None:
    """Calls a method that changes the state, and checks its answer and the reads after it."""
    status, answer = call(method, **request)
    equal((status, answer.get("success"), answer.get("state")), (200, True, state))
    equal(call("GetVmInfo", vm_id=request["vm_id"])[1]["state"], state)


def refused(http_status: int, code: str, method: str, **request: object) -> dict:
    """Calls a method that must fail, and returns the error."""
    status, answer = call(method, **request)
    equal((status, answer.get("code"), bool(answer.get("message"))), (http_status, code, True))
    return answer


def lifecycle() -> None:
    """Takes one VM from its creation to its deletion."""
    vm = {"vm_id": "python-json"}
    config = {
        "cpu": {"vcpu_count": 1},
        "memory": {"size_bytes": MEMORY},
        "boot": {"kernel_path": KERNEL},
        "metadata": {"made_by": "python-json"},
    }
    status, answer = call("CreateVm", **vm, config=config)
    equal((status, answer["vm_id"], answer["state"]), (200, "python-json", "VM_STATE_CREATED"))
    refused(400, "failed_precondition", "PauseVm", **vm)
    expect("BootVm", "VM_STATE_RUNNING", **vm)
    expect("PauseVm", "VM_STATE_PAUSED", **vm)
    expect("ResumeVm", "VM_STATE_RUNNING", **vm)
    expect("RebootVm", "VM_STATE_RUNNING", **vm, force=True)
    status, answer = call("GetVmInfo", **vm)
    equal((answer["config"]["memory"]["size_bytes"], answer["config"]["boot"]["kernel_path"]), (str(MEMORY), KERNEL))
    status, answer = call("ListVms", state_filter=["VM_STATE_RUNNING"], metadata_filter={"made_by": "python-json"})
    equal((answer["total_count"], [found["vm_id"] for found in answer["vms"]]), (1, ["python-json"]))
    expect("ShutdownVm", "VM_STATE_SHUTDOWN", **vm, force=True)
    expect("BootVm", "VM_STATE_RUNNING", **vm)
    refused(400, "failed_precondition", "DeleteVm", **vm)
    status, answer = call("DeleteVm", **vm, force=True)
    equal((status, answer["success"]), (200, True))
    refused(404, "not_found", "GetVmInfo", **vm)


def violations() -> None:
    """Sends two mistakes at once; the message names both."""
    config = {"cpu": {"vcpu_count": -1}, "memory": {"size_bytes": 1000}}
    error = refused(400, "invalid_argument", "CreateVm", config=config)
    for field in ("config.cpu.vcpu_count", "config.memory.size_bytes"):
        equal((field, field in error["message"]), (field, True))
    equal(error["details"][0]["type"], "google.rpc.BadRequest")
