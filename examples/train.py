"""The main job: train an image classifier with synchronized batch normalization.

  python -m examples.train --config=configs/digits.py --config.batch_size=256

Any key of the config may be changed on the command line. Results go to config.workdir;
the same command run again continues there. Ctrl-C saves and stops; twice, it just stops.
"""

import contextlib
import functools
import logging
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: its own folder is on the path, but not the repository
  sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
from grain.sharding import ShardByJaxProcess
from rich.console import Console

from examples import (
  checkpoints,
  curves,
  data,
  hosts,
  interrupts,
  microbatches,
  models,
  optimizers,
  parallelism,
  reporting,
  settings,
  steps,
)
from examples.settings import Failure, UserError

DEFAULT_CONFIG = "configs/digits.py"
VIRTUAL_DEVICES = 4  # where only a CPU is found; over all processes
CURVES = "curves.png"


def main(argv: Sequence[str]) -> int:
  """Runs the job; returns the exit status.

  0: done. 1: stopped by something else, such as a full disk. 2: a user's mistake. 128 + a signal.
  """
  if {"-h", "--help"} & set(argv):
    print(__doc__)
    return 0
  logging.getLogger("absl").setLevel(logging.CRITICAL)  # what failed is said once, below
  try:
    config = settings.from_command_line(argv, DEFAULT_CONFIG)
    if jax.config.values["jax_num_cpu_devices"] < 0:  # not set by the user
      count = max((config.devices or VIRTUAL_DEVICES) // max(config.processes, 1), 1)
      jax.config.update("jax_num_cpu_devices", count)
    hosts.join(config)
    program = "-m examples.train" if __package__ else shlex.quote(argv[0])
    return hosts.leave(run(config, f"python {program} {shlex.join(argv[1:])}"), together=True)
  except UserError as error:
    code, message = 2, f"error: {error}"
  except (Failure, OSError) as error:
    code, message = 1, f"error: {error}"
  except KeyboardInterrupt:
    code, message = 130, "Stopped without saving; what was saved before is kept."
  except Exception as error:
    if not hosts.is_loss(error):
      raise
    return hosts.leave(hosts.wait_for_verdict(error, config.peer_timeout), together=False)
  print(message, file=sys.stderr)
  return hosts.leave(code, together=False)


def run(config: Any, command: str = "the same command") -> int:
  """Trains as `config` says, or goes on with it; `command` is what starts this run again."""
  started = time.perf_counter()
  console = Console(soft_wrap=True, highlight=False, quiet=not hosts.is_first())

  # Whatever can be wrong is found here, before any work.
  devices = choose_devices(config.devices)
  settings.check(config, len(devices))
  parallel = parallelism.create(config, devices)
  accumulation = config.microbatches, config.microbatch_statistics
  optimizer = optimizers.create(config)
  dataset, batches = hosts.in_turn(lambda: load(config))
  image_shape = dataset.train_images.shape[1:]
  axes = microbatches.axes(parallel.axis_name, *accumulation)
  virtual = settings.virtual_batch_size(config, len(devices))
  model = models.create(config, image_shape, len(dataset.class_names), axes, virtual)
  directory = Path(config.workdir)
  hosts.in_turn(lambda: settings.claim(directory, config))

  with (
    contextlib.closing(batches),
    interrupts.requests() as interrupt,
    checkpoints.Checkpoints(directory / "checkpoints", config.keep, console.print) as store,
  ):
    # Start from the seed, or from where the last run stopped.
    step = store.latest() or 0
    if step >= config.steps:
      console.print(
        f"{directory} is finished already: to start afresh, delete it or give another "
        "--config.workdir."
      )
      rows = reporting.read_rows(directory)
      if hosts.is_first() and not (directory / CURVES).exists():  # killed before it was drawn
        draw(config, rows)
      show_result(console, config, rows)
      return 0
    state = steps.init_state(model, optimizer, config.seed, image_shape)
    if step:
      state = store.restore(step, state, batches)
      console.print(f"Resuming {directory} after step {step} of {config.steps}.")
    state = parallel.replicate(state)

    # The one body of each step, on every device.
    train_step = parallel.step(
      functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizer,
        label_smoothing=config.label_smoothing,
        accumulate=microbatches.create(*accumulation),
        skip_nonfinite=optimizers.skips(config),
      ),
      donate_state=True,
    )
    eval_step = parallel.step(functools.partial(steps.eval_step, model=model))

    stop = hosts.Agreement()
    with reporting.Reporter(directory, config, step, console) as report:
      while step < config.steps and not stop.reached(bool(interrupt)):
        batch = parallel.shard(report.take(batches))
        state, sums = train_step(state, batch)
        step += 1
        report.stepped(step, sums)
        if step % config.eval_every == 0 or step == config.steps:
          with report.pause(step):
            tests = data.test_batches(dataset, config.eval_batch_size, ShardByJaxProcess())
            report.tested(step, *steps.evaluate(eval_step, state, tests, parallel))
        if step % config.save_every == 0:
          with report.pause(step):
            store.save(step, steps.unreplicate(state), batches)
      report.finish_window(step)
      store.save(step, steps.unreplicate(state), batches)

  if hosts.is_first():
    draw(config, report.rows)
  if step < config.steps:
    console.print(f"Interrupted: saved after step {step} of {config.steps}. To go on: {command}")
    return 128 + (interrupt.signal or signal.SIGTERM)  # which another process was sent
  show_result(console, config, report.rows)
  console.print(
    f"It took {time.perf_counter() - started:.1f} s: {report.compiling:.1f} s until the first "
    f"step was done, {report.training:.1f} s for the others, of which "
    f"{report.waiting / max(report.training, 1e-9):.2%} waiting for input."
  )
  return 0


def choose_devices(count: int) -> list[jax.Device]:
  """The first `count` devices, the same number of each process; all of them for 0."""
  devices = jax.devices()
  if not 0 <= count <= len(devices):
    raise UserError(
      f"config.devices is {count}, but there are {len(devices)} devices "
      f"({devices[0].platform}); choose 1 to {len(devices)}, or 0 for all"
    )
  processes = jax.process_count()
  owned = [[d for d in devices if d.process_index == i] for i in range(processes)]
  share, left = divmod(count or len(devices), processes)
  if left or any(len(own) < share for own in owned):
    raise UserError(
      f"config.devices is {count}, but {processes} processes have to bring the same number each; "
      f"they have {', '.join(str(len(own)) for own in owned)}; try --config.devices="
      f"{processes * min(share or 1, *map(len, owned))}"
    )
  return [device for own in owned for device in own[:share]]


def load(config: Any) -> tuple[data.Dataset, Any]:
  """The data set and the endless iterator over its training batches."""
  try:
    dataset = data.load(config.dataset, config.data_dir or None, download=config.download)
    return dataset, data.train_batches(
      dataset,
      config.batch_size,
      seed=config.seed,
      augment=config.augment,
      shard=ShardByJaxProcess(),
    )
  except (ValueError, OSError) as error:  # these say what is wrong with which file or argument
    raise UserError(str(error)) from error


def draw(config: Any, rows: list[dict[str, Any]]) -> None:
  """Draws the curves of a run, all of them or nothing."""
  title = f"{config.model} on {config.dataset}"
  if config.label_smoothing:
    title += f" (training labels smoothed by {config.label_smoothing})"
  draft = Path(config.workdir) / f"draft-{CURVES}"
  curves.draw(rows, draft, title)
  draft.replace(Path(config.workdir) / CURVES)


def show_result(console: Console, config: Any, rows: list[dict[str, Any]]) -> None:
  """Says how well the network does, and where the rest is."""
  accuracy = reporting.latest(rows, "test_accuracy")
  examples = reporting.latest(rows, "test_examples")
  console.print(
    f"Test accuracy {accuracy:.2%} on {examples} examples after {config.steps} steps of "
    f"{config.batch_size}; curves, metrics, TensorBoard logs and checkpoints are in "
    f"{config.workdir}."
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv))
