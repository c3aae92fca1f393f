"""What this machine says of itself."""

from pocketsize.measurement.machine import cpu_seconds, load_average, machine, peak_rss_bytes, versions


def test_the_machine_is_described_in_plain_values():
    here = machine()
    assert here["cpu"] and here["cores"] >= 1 and here["threads"] >= 1
    assert here["memory_bytes"] > 2**28
    assert all(isinstance(value, (str, int, float, bool)) for value in here.values())


def test_versions_name_what_is_installed():
    assert {"torch", "transformers", "numpy"} <= versions().keys()


def test_use_only_grows():
    cpu, peak = cpu_seconds(), peak_rss_bytes()
    held = bytearray(b"x" * (peak + 2**24 - 2**20))
    assert sum(range(200_000)) and len(held)
    assert cpu_seconds() >= cpu
    assert peak_rss_bytes() > peak > 2**20
    assert load_average() >= 0
