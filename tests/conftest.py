"""Every test runs on 8 CPU devices, with warnings and implicit rank promotion as errors."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
