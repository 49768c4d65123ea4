"""Settings every test shares; they must be made before JAX is imported."""

import os

from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT_DEVICES}"

# Compilation makes first examples slow, and a seed makes failures repeatable.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.load_profile("fixed")
