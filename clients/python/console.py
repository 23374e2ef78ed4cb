"""The console of a guest: its output from the first message on, and a line that is typed."""

import grpc
from vmm.v1 import vm_pb2 as pb

from api import TIMEOUT, config, vms
from checks import ECHO_KERNEL


def console() -> None:
    vm = {"vm_id": "python-console"}

    # Step 1: BootVm starts a guest that echoes its input.
    vms.CreateVm(pb.CreateVmRequest(**vm, config=config(ECHO_KERNEL)), timeout=TIMEOUT)
    try:
        vms.BootVm(pb.BootVmRequest(**vm), timeout=TIMEOUT)

        # Step 2: StreamConsole sends the output from the first message on.
        stream = vms.StreamConsole(pb.StreamConsoleRequest(**vm, follow=True), timeout=TIMEOUT)
        output = b""

        def until(text: bytes) -> None:
            nonlocal output
            while text not in output:
                message = next(stream, None)
                if message is None:
                    raise AssertionError(f"{text!r} did not come before the end of the stream: {output!r}")
                output += message.data

        until(b"kind=echo")

        # Step 3: WriteConsole types a line, and the guest echoes the line.
        vms.WriteConsole(pb.WriteConsoleRequest(**vm, data=b"hello from Python\r"), timeout=TIMEOUT)
        until(b"hello from Python")

        # Step 4: DeleteVm ends the stream, without an error.
        vms.DeleteVm(pb.DeleteVmRequest(**vm, force=True), timeout=TIMEOUT)
        for _ in stream:
            pass
    finally:
        try:
            vms.DeleteVm(pb.DeleteVmRequest(**vm, force=True), timeout=TIMEOUT)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
