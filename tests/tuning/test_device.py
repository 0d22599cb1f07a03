"""The kind of a device, from trees of sysfs: captured ones, and any that hypothesis makes."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from volumes import volume

from engine.tuning.device import Device, HostTree, Kind, chunk_counts, describe, mount_of

SLOWEST_FIRST: tuple[Kind, ...] = ("rotational", "network", "none", "unknown", "virtual", "ssd", "nvme", "memory")


class FakeTree:
    """Files by path, links by path, and the devices of files."""

    def __init__(
        self,
        files: dict[str, str],
        links: dict[str, str] | None = None,
        devices: dict[str, tuple[int, int]] | None = None,
        nodes: dict[str, tuple[int, int]] | None = None,
    ) -> None:
        self.files, self.links, self.devices, self.nodes = files, links or {}, devices or {}, nodes or {}

    def text(self, path: str) -> str:
        return self.files.get(path, "")

    def names(self, path: str) -> list[str]:
        prefix = path + "/"
        entries = [*self.files, *self.links]
        return sorted({entry[len(prefix) :].split("/")[0] for entry in entries if entry.startswith(prefix)})

    def real(self, path: str) -> str | None:
        target = self.links.get(path)
        if target is not None:
            return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        return path if self.names(path) or path in self.files else None

    def file_device(self, path: str) -> tuple[int, int] | None:
        best = max((known for known in self.devices if (path + "/").startswith(known.rstrip("/") + "/")), default=None)
        return None if best is None else self.devices[best]

    def node_device(self, path: str) -> tuple[int, int] | None:
        return self.nodes.get(path)


def mounted(kind: str, source: str, point: str = "/", options: str = "rw", number: str = "0:40") -> str:
    return f"27 1 {number} / {point} rw,relatime shared:1 - {kind} {source} {options}"


VIRTIO = "/sys/devices/pci0000:00/0000:00:02.0/virtio1/block/vda"
NVME = "/sys/devices/pci0000:00/0000:00:1d.0/0000:3d:00.0/nvme/nvme0/nvme0n1"
SATA = "/sys/devices/pci0000:00/0000:00:17.0/ata1/host0/target0:0:0/0:0:0:0/block/sda"
DISK = "/sys/devices/pci0000:00/0000:00:17.0/ata2/host1/target1:0:0/1:0:0:0/block/sdb"
MAPPER, MD, LOOP = (
    "/sys/devices/virtual/block/dm-0",
    "/sys/devices/virtual/block/md0",
    "/sys/devices/virtual/block/loop0",
)

# Trees of real hosts, cut down to what is read.
CAPTURED: dict[str, tuple[FakeTree, Device]] = {
    "virtio, whose flag says rotational": (
        FakeTree(
            {
                "/proc/self/mountinfo": mounted("ext4", "/dev/vda", number="254:0"),
                f"{VIRTIO}/queue/rotational": "1",
                f"{VIRTIO}/dev": "254:0",
            },
            {"/sys/dev/block/254:0": "../../devices/pci0000:00/0000:00:02.0/virtio1/block/vda"},
            {"/": (254, 0)},
        ),
        Device("ext4", "virtual", ("vda",)),
    ),
    "a partition of an NVMe drive": (
        FakeTree(
            {
                "/proc/self/mountinfo": mounted("xfs", "/dev/nvme0n1p2", number="259:2"),
                f"{NVME}/queue/rotational": "0",
                f"{NVME}/nvme0n1p2/partition": "2",
            },
            {"/sys/dev/block/259:2": NVME + "/nvme0n1p2"},
            {"/": (259, 2)},
        ),
        Device("xfs", "nvme", ("nvme0n1",)),
    ),
    "LUKS and LVM on a partition of an SSD": (
        FakeTree(
            {
                "/proc/self/mountinfo": mounted("ext4", "/dev/mapper/root", number="253:0"),
                f"{MAPPER}/dm/name": "root",
                f"{MAPPER}/queue/rotational": "0",
                f"{SATA}/queue/rotational": "0",
                f"{SATA}/sda3/partition": "3",
            },
            {"/sys/dev/block/253:0": MAPPER, f"{MAPPER}/slaves/sda3": SATA + "/sda3"},
            {"/": (253, 0)},
        ),
        Device("ext4", "ssd", ("dm-0", "sda")),
    ),
    "a mirror of an SSD and a rotating disk": (
        FakeTree(
            {
                "/proc/self/mountinfo": mounted("ext4", "/dev/md0", number="9:0"),
                f"{MD}/md/level": "raid1",
                f"{SATA}/queue/rotational": "0",
                f"{DISK}/queue/rotational": "1",
            },
            {"/sys/dev/block/9:0": MD, f"{MD}/slaves/sda": SATA, f"{MD}/slaves/sdb": DISK},
            {"/": (9, 0)},
        ),
        Device("ext4", "rotational", ("md0", "sda", "sdb")),
    ),
    "a loop device over a file in memory": (
        FakeTree(
            {
                "/proc/self/mountinfo": "\n".join(
                    [mounted("tmpfs", "none", "/dev/shm"), mounted("ext4", "/dev/loop0", "/mnt/a\\040b", number="7:0")]
                ),
                f"{LOOP}/loop/backing_file": "/dev/shm/image",
                f"{LOOP}/queue/rotational": "0",
            },
            {"/sys/dev/block/7:0": LOOP},
            {"/mnt/a b": (7, 0), "/dev/shm": (0, 23)},
        ),
        Device("ext4", "memory", ("loop0",)),
    ),
    "btrfs, which has a number of its own": (
        FakeTree(
            {
                "/proc/self/mountinfo": mounted("btrfs", "/dev/nvme0n1", options="rw,subvol=/@"),
                f"{NVME}/queue/rotational": "0",
            },
            {"/sys/dev/block/259:0": NVME},
            {"/": (0, 33)},
            {"/dev/nvme0n1": (259, 0)},
        ),
        Device("btrfs", "nvme", ("nvme0n1",)),
    ),
    "an overlay, whose upper directory is seen": (
        FakeTree(
            {
                "/proc/self/mountinfo": "\n".join(
                    [
                        mounted("overlay", "overlay", options="rw,lowerdir=/l,upperdir=/data/upper,workdir=/w"),
                        mounted("ext4", "/dev/vda", "/data", number="254:0"),
                    ]
                ),
                f"{VIRTIO}/queue/rotational": "1",
            },
            {"/sys/dev/block/254:0": VIRTIO},
            {"/": (0, 50), "/data": (254, 0)},
        ),
        Device("overlay over ext4", "virtual", ("vda",)),
    ),
    "an overlay in a container": (
        FakeTree(
            {"/proc/self/mountinfo": mounted("overlay", "overlay", options="rw,upperdir=/var/lib/docker/u")},
            {},
            {"/run": (0, 50)},
        ),
        Device("overlay", "none", ()),
    ),
    "NFS": (
        FakeTree({"/proc/self/mountinfo": mounted("nfs4", "server:/export")}, {}, {"/": (0, 60)}),
        Device("nfs4", "network", ()),
    ),
    "a host without /proc and /sys": (FakeTree({}, {}, {"/": (8, 0)}), Device("", "unknown", ())),
    "iSCSI": (
        FakeTree(
            {
                "/proc/self/mountinfo": mounted("xfs", "/dev/sdc", number="8:32"),
                "/sys/devices/platform/host2/session1/target2:0:0/2:0:0:0/block/sdc/queue/rotational": "0",
            },
            {"/sys/dev/block/8:32": "/sys/devices/platform/host2/session1/target2:0:0/2:0:0:0/block/sdc"},
            {"/": (8, 32)},
        ),
        Device("xfs", "network", ("sdc",)),
    ),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_trees(name: str) -> None:
    tree, expected = CAPTURED[name]
    directory = "/mnt/a b/runs" if "loop" in name else "/run/a"
    assert describe(tree, directory) == expected


def drive_tree(leaves: list[tuple[str, str]], slaves: list[tuple[int, int]], middle_count: int) -> FakeTree:
    """Devices dm-0 to dm-N with edges among them and to leaves, cycles included; dm-0 has the file system."""
    files = {"/proc/self/mountinfo": mounted("ext4", "/dev/dm-0", number="253:0")}
    links = {"/sys/dev/block/253:0": "/sys/dm-0"}
    for index in range(middle_count):
        files[f"/sys/dm-{index}/dm/name"] = "x"
    for index, (name, rotational) in enumerate(leaves):
        files[f"/sys/leaf{index}/{name}/queue/rotational"] = rotational
    for above, below in slaves:
        target = f"/sys/dm-{below}" if below < middle_count else _leaf(leaves, below - middle_count)
        links[f"/sys/dm-{above % middle_count}/slaves/{posixpath.basename(target)}-{below}"] = target
    return FakeTree(files, links, {"/": (253, 0)})


def _leaf(leaves: list[tuple[str, str]], index: int) -> str:
    return f"/sys/leaf{index % len(leaves)}/{leaves[index % len(leaves)][0]}"


LEAVES: dict[tuple[str, str], Kind] = {
    ("nvme0n1", "0"): "nvme",
    ("sda", "0"): "ssd",
    ("sdb", "1"): "rotational",
    ("vda", "1"): "virtual",
    ("nbd0", "0"): "network",
    ("sdx", ""): "unknown",
}


@given(st.data(), st.integers(1, 5), st.lists(st.sampled_from(sorted(LEAVES)), min_size=1, max_size=5))
def test_any_graph_of_devices_ends_at_the_slowest_drive_that_it_reaches(
    data: st.DataObject, middle_count: int, leaves: list[tuple[str, str]]
) -> None:
    ends = st.integers(0, middle_count + len(leaves) - 1)
    slaves = data.draw(st.lists(st.tuples(st.integers(0, middle_count - 1), ends), max_size=12))
    found = describe(drive_tree(leaves, slaves, middle_count), "/run")
    reached, todo = {0}, [0]
    while todo:
        above = todo.pop()
        for start, end in slaves:
            if start == above and end not in reached:
                reached.add(end)
                todo.append(end)
    kinds: list[Kind] = [LEAVES[leaves[end - middle_count]] for end in reached if end >= middle_count]
    # A mapped device without any below is a leaf itself, and says nothing of its kind.
    bare = [node for node in reached if node < middle_count and not any(start == node for start, _ in slaves)]
    kinds += ["unknown"] * len(bare)
    assert found.kind == min(kinds, key=SLOWEST_FIRST.index, default="unknown")


@given(st.dictionaries(st.sampled_from(["/proc/self/mountinfo", "/sys/a/partition", "/sys/a/slaves/b"]), st.text()))
def test_no_content_of_files_raises(files: dict[str, str]) -> None:
    tree = FakeTree(files, {"/sys/dev/block/8:1": "/sys/a"}, {"/": (8, 1)})
    assert describe(tree, "/run").kind in SLOWEST_FIRST


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=5).filter(
    lambda name: name not in (".", "..")
)


@given(st.lists(NAMES, min_size=1, max_size=4), st.integers(0, 4))
def test_the_longest_mount_point_above_a_path_is_its_mount(names: list[str], depth: int) -> None:
    def escaped(text: str) -> str:
        return "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in text)

    points = ["/", *("/" + "/".join(names[: end + 1]) for end in range(len(names)))]
    lines = [mounted(f"kind{index}", escaped(point), escaped(point)) for index, point in enumerate(points)]
    if any(len(line.splitlines()) != 1 for line in lines):
        return  # the kernel writes bytes, and ends lines with newlines only
    chosen = min(depth, len(names))
    found = mount_of("\n".join(lines), points[chosen])
    assert found.file_system == f"kind{chosen}" and found.source == points[chosen]


def test_this_host_is_described(tmp_path: Path) -> None:
    assert describe(HostTree(), os.path.realpath(tmp_path)).file_system


def test_a_loop_device_of_this_host_leads_to_what_its_file_is_on() -> None:
    with volume("ext4", 32 << 20) as mount:
        found = describe(HostTree(), str(mount))
    assert found.file_system == "ext4" and found.names[0].startswith("loop")
    assert found.kind != "unknown"


@pytest.mark.parametrize("kind", SLOWEST_FIRST)
def test_chunk_counts_are_the_notes(kind: Kind) -> None:
    slow, middling, fast = (chunk_counts(kind, speed) for speed in (1e8, 5e8, 5e9))
    fixed = {"rotational": (1, 1), "ssd": (1, 2), "nvme": (2, 3), "memory": (2, 3)}
    assert (slow, middling, fast) == ((fixed[kind],) * 3 if kind in fixed else ((1, 1), (1, 2), (2, 3)))
