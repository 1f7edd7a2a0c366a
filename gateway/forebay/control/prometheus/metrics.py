# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Prometheus text (exposition format 0.0.4) from what `status` and `cache_info` tell.

Names follow prometheus.io/docs/practices/naming: one prefix, base units, `_total` on counters. Hits and misses are
exported, never a ratio, which could not be summed over hosts. The label of a disk is its name alone; image and mode
stand in `forebay_disk_info`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from forebay import __version__

Values = Mapping[str, Any]


PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
"""The media type."""


class Metric(NamedTuple):
    """A family with one sample for each `(labels, key)`: `key` is where status or cache_info has its value."""

    name: str
    kind: str
    text: str
    samples: tuple[tuple[str, str], ...]


def _one(name: str, kind: str, text: str, key: str) -> Metric:
    """A family with one sample, which has no labels of its own."""
    return Metric(name, kind, text, (("", key),))


DISK_METRICS = (
    Metric(
        "cache_hits_total",
        "counter",
        "Requests that the cache answered.",
        (('op="read"', "read_hits"), ('op="write"', "write_hits")),
    ),
    Metric(
        "cache_misses_total",
        "counter",
        "Requests that needed the origin.",
        (('op="read"', "read_misses"), ('op="write"', "write_misses")),
    ),
    _one("read_bytes_total", "counter", "Bytes that clients read.", "read_bytes"),
    _one("written_bytes_total", "counter", "Bytes that clients wrote.", "written_bytes"),
    _one("origin_read_bytes_total", "counter", "Bytes read from the image.", "origin_read_bytes"),
    _one(
        "origin_written_bytes_total",
        "counter",
        "Bytes written to the image.",
        "origin_written_bytes",
    ),
    _one(
        "trims_ignored_total",
        "counter",
        "TRIM requests passed over, as the store cannot give space back.",
        "trims_ignored",
    ),
    _one("origin_errors_total", "counter", "Requests that the image failed.", "origin_errors"),
    _one("disk_size_bytes", "gauge", "Size of the disk.", "size"),
    _one(
        "cached_bytes",
        "gauge",
        "Bytes of the disk that the cache holds; disks on one image share them.",
        "cached_bytes",
    ),
    _one("dirty_bytes", "gauge", "Bytes that only the cache holds.", "dirty_bytes"),
    _one("oldest_dirty_seconds", "gauge", "Age of the oldest of them.", "lag_seconds"),
    _one("max_lag_seconds", "gauge", "Age that they are to reach at most.", "max_lag_seconds"),
    _one("iops_limit", "gauge", "Requests a second that clients may make; 0: any.", "iops"),
    _one("bps_limit_bytes", "gauge", "Bytes a second that they may ask for; 0: any.", "bps"),
    _one(
        "throttled_waits_total",
        "counter",
        "How often a connection had to wait for these limits.",
        "throttled_waits",
    ),
    _one(
        "throttled_seconds_total",
        "counter",
        "How long at least one connection waited for them.",
        "throttled_seconds",
    ),
    _one("weight", "gauge", "What the disk gets beside others.", "weight"),
    _one("nbd_connections", "gauge", "Clients that are connected.", "clients"),
    _one("queue_depth", "gauge", "Requests that wait for something.", "queue_depth"),
    _one("slow_requests_total", "counter", "Requests that took longer than slow.", "slow_requests"),
)
"""One sample for each disk; what a status does not have is left out."""

CACHE_METRICS = (
    _one("cache_size_bytes", "gauge", "Size of the cache device.", "size"),
    _one("cache_used_bytes", "gauge", "Bytes of it that hold data.", "used_bytes"),
    _one("cache_clean_bytes", "gauge", "Bytes of it that the images have too.", "clean_bytes"),
    _one("cache_private_bytes", "gauge", "Bytes of it that belong to one disk.", "private_bytes"),
    _one("cache_journal_bytes", "gauge", "Bytes of its write journal in use.", "journal_bytes"),
    _one("cache_free_blocks", "gauge", "Blocks that nothing is in.", "free_slots"),
    _one("evicted_blocks_total", "counter", "Blocks given away for others.", "evicted_blocks"),
    _one("damaged_blocks", "gauge", "Blocks taken out of use.", "damaged_slots"),
    _one(
        "loop_stall_seconds_max",
        "gauge",
        "The longest time that all disks waited for one task of the daemon.",
        "loop_stall_seconds_max",
    ),
    Metric(
        "loop_stalls_total",
        "counter",
        "How often they waited longer than that many seconds.",
        (('longer_than="0.02"', "loop_stalls"), ('longer_than="0.1"', "loop_long_stalls")),
    ),
)

STORE_METRICS = (
    _one("store_connections", "gauge", "Clients of the store's socket.", "clients"),
    _one("store_images", "gauge", "Images that are attached for them.", "images"),
    _one(
        "store_refused_connections_total",
        "counter",
        "Connections of processes that may not use the socket.",
        "refused_clients",
    ),
)
"""One sample for each store that has a socket."""

MEMORY = {
    "client_memory": "requests and replies of clients hold",
    "block_status_memory": "requests for block status hold",
    "connection_memory": "connections hold for buffers",
    "fill_memory": "data holds that was fetched and is not stored yet",
    "kept_write_memory": "writes hold that may not be durable in their image yet",
    "record_memory": "records hold that are not in the journal yet",
}
"""By budget, who holds it."""

GATEWAY_METRICS = (
    _one("core", "gauge", "1 if the compiled core serves hits and writes.", "core"),
    *(
        _one(f"{name}{part}_bytes", "gauge", f"Memory that {who}{said}.", f"{name}{part}_bytes")
        for name, who in MEMORY.items()
        for part, said in (("", ""), ("_limit", ", at most"))
    ),
)


def metrics_text(
    disks: Sequence[Values],
    cache: Values,
    gateway: Values = MappingProxyType({}),
    stores: Sequence[Values] = (),
) -> str:
    """The text at `/metrics`; see `metrics_lines`."""
    return (
        "\n".join(line for lines in metrics_lines(disks, cache, gateway, stores) for line in lines)
        + "\n"
    )


def metrics_lines(
    disks: Sequence[Values], cache: Values, gateway: Values, stores: Sequence[Values]
) -> Iterator[list[str]]:
    """The lines of each family: as many as there are disks, so each is a slice of work.

    `disks` is the status of each disk, `cache` what cache_info has, `gateway` what info has, `stores` what is told of
    each store.
    """
    yield [*_family("build_info", "gauge", "What runs.", [(f'version="{__version__}"', 1)])]
    words = ((_words(disk), 1) for disk in disks)
    yield [*_family("disk_info", "gauge", "The disks, by words.", words)]
    for metric in DISK_METRICS:
        yield [*_family(metric.name, metric.kind, metric.text, _disk_samples(metric, disks))]
    for metric in STORE_METRICS:
        yield [*_family(metric.name, metric.kind, metric.text, _store_samples(metric, stores))]
    for metrics, values in ((CACHE_METRICS, cache), (GATEWAY_METRICS, gateway)):
        for metric in metrics:
            found = [(labels, values[key]) for labels, key in metric.samples if key in values]
            yield [*_family(metric.name, metric.kind, metric.text, found)]
    working = cache.get("state")
    if working is not None:
        ok = int(working == "ok")
        yield [*_family("cache_ok", "gauge", "1 while the cache device works.", [("", ok)])]


def _disk_samples(metric: Metric, disks: Iterable[Values]) -> Iterator[tuple[str, float]]:
    """(labels, value) of a family, for each disk whose status has it."""
    for disk in disks:
        for labels, key in metric.samples:
            if key in disk:
                yield ",".join(filter(None, (label("disk", disk["name"]), labels))), disk[key]


def _store_samples(metric: Metric, stores: Iterable[Values]) -> Iterator[tuple[str, float]]:
    """(labels, value) of a family, for each store that has a socket; the number of what is a list."""
    for store in stores:
        for _, key in metric.samples:
            if store["socket"]:
                value = store[key]
                yield (
                    label("store", store["store"]),
                    len(value) if isinstance(value, list) else value,
                )


def _words(disk: Values) -> str:
    """The labels that say in words how a disk is."""
    told = {"disk": disk["name"], "image": disk["image"], "mode": disk["mode"]}
    told |= {"state": disk["state"], "overlay": disk["overlay"], "read_only": disk["read_only"]}
    return ",".join(label(key, value) for key, value in told.items())


def label(name: str, value: object) -> str:
    """A label, its value escaped."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    for character, written in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n")):
        text = text.replace(character, written)
    return f'{name}="{text}"'


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> Iterator[str]:
    """The lines of a family; none where there is no sample."""
    heading = (f"# HELP forebay_{name} {text}", f"# TYPE forebay_{name} {kind}")
    for number, (labels, value) in enumerate(samples):
        if number == 0:
            yield from heading
        yield f"forebay_{name}{'{' + labels + '}' if labels else ''} {_number(value)}"


def _number(value: float) -> str:
    return f"{int(value) if isinstance(value, bool) else value}"
