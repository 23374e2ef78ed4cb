//! A disk's block nodes and its device.

use serde_json::{Value, json};
use vmm_core::spec::{Disk, DiskFormat, RateLimit, option_is_true, rate_limit};

use super::option::DiskOption;
use super::{DISK_SLOT, ImageKind, Machine, PathNotUtf8, address, merged};

/// Bytes of a virtio disk's serial number; a longer id is cut.
const SERIAL_LEN: usize = 20;

/// What becomes of a disk.
///
/// # Errors
///
/// [`PathNotUtf8`].
pub(super) fn option(
    machine: Machine,
    place: usize,
    disk: &Disk,
    image: ImageKind,
) -> Result<DiskOption, PathNotUtf8> {
    let filename = disk.path.to_str().ok_or_else(|| PathNotUtf8(disk.path.clone()))?;
    let throttle = format!("disk{place}");
    let direct = option_is_true(&disk.options, "direct_io").unwrap_or(false);
    let no_flush = disk.options.get("cache").is_some_and(|cache| cache == "unsafe");
    let common = json!({
        "read-only": disk.read_only,
        "discard": if disk.read_only { "ignore" } else { "unmap" },
        "cache": { "direct": direct, "no-flush": no_flush },
    });
    let driver = match image {
        ImageKind::File => "file",
        ImageKind::BlockDevice => "host_device",
    };
    let file_node = json!({
        "driver": driver, "node-name": format!("disk{place}-file"), "filename": filename, "locking": "auto",
    });
    let mut format_node =
        json!({ "driver": disk.format.as_str(), "node-name": format!("disk{place}-format") });
    if disk.format == DiskFormat::Qcow2 && !disk.backing_files {
        // Whatever the image's header says, no other file is opened.
        format_node["backing"] = Value::Null;
    }
    let mut nodes = vec![merged(file_node, &common), merged(format_node, &common)];
    let limits = rate_limit(&disk.options, "rate_limit.operations_per_second").unwrap_or_default();
    let limit = throttle_group(&throttle, limits);
    if let Some(group) = &limit {
        nodes.push(json!({
            "driver": "throttle", "node-name": throttle, "throttle-group": group["id"],
            "read-only": disk.read_only,
        }));
    }
    // Ids are ASCII; a fault of the disk is the guest's to handle, as on the other backends.
    let serial: String = disk.id.chars().take(SERIAL_LEN).collect();
    let device = json!({
        "driver": format!("virtio-blk-{}", machine.virtio()), "id": format!("disk{place}"),
        "serial": serial, "werror": "report", "rerror": "report",
    });
    Ok(DiskOption { nodes, limit, device: merged(device, &address(machine, DISK_SLOT, place, place)) })
}

fn throttle_group(disk: &str, limits: RateLimit) -> Option<Value> {
    let mut ceilings = serde_json::Map::new();
    if let Some(bytes) = limits.bytes_per_second {
        ceilings.insert("bps-total".to_owned(), bytes.into());
    }
    if let Some(operations) = limits.operations_per_second {
        ceilings.insert("iops-total".to_owned(), operations.into());
    }
    (!ceilings.is_empty())
        .then(|| json!({ "qom-type": "throttle-group", "id": format!("{disk}-limit"), "limits": ceilings }))
}
