"""Eight virtual CPU devices for every test: set before any backend starts."""

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)

# Derandomized so that a run says the same thing everywhere; no deadline, for the first example of a
# shape compiles.
hypothesis.settings.register_profile(
  "jaxbn",
  deadline=None,
  derandomize=True,
  max_examples=40,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxbn")
