"""The main job: train an image classifier with synchronized batch normalization.

  python -m examples.train --config=configs/digits.py --config.learning_rate=0.01

Any key of the config may be changed on the command line: --help lists them. Results go to
config.workdir; the same command run again continues there. Ctrl-C saves and stops; twice, it just
stops.
"""
# ruff: noqa: E402 (what takes seconds to import comes after what can wait for no import)

import contextlib
import functools
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
if not __package__:  # run as a file: its own folder is on the path, but not the repository
  sys.path[0] = str(Path(__file__).resolve().parents[1])

from absl import logging

from examples import interrupts

logging.set_verbosity(logging.FATAL)  # what failed is said once, by `main`
if __name__ == "__main__":
  interrupts.during_imports()  # of which the following take seconds

import jax
import numpy as np
from grain.sharding import ShardByJaxProcess
from rich.console import Console

from examples import (
  checkpoints,
  command_line,
  curves,
  data,
  diagnose,
  hosts,
  microbatches,
  models,
  optimizers,
  parallelism,
  reporting,
  run_directory,
  settings,
  steps,
)
from examples.clock import Clock
from examples.settings import Failure, UserError

DEFAULT_CONFIG = "configs/digits.py"
VIRTUAL_DEVICES = 4  # where only a CPU is found; over all processes
CURVES = "curves.png"


def main(argv: Sequence[str]) -> int:
  """Runs the job; returns the exit status.

  0: done. 1: stopped by something else, such as a full disk. 2: a user's mistake. 128 + a signal.
  """
  try:
    interrupts.after_imports()
    if {"-h", "--help"} & set(argv):
      print(command_line.show_help(argv, DEFAULT_CONFIG))
      return 0
    config = command_line.parse(argv, DEFAULT_CONFIG)
    if jax.config.values["jax_num_cpu_devices"] < 0:  # not set by the user
      count = max((config.devices or VIRTUAL_DEVICES) // config.processes, 1)
      jax.config.update("jax_num_cpu_devices", count)
    hosts.join(config)
    command = command_line.command(argv, as_module=bool(__package__))
    return hosts.leave(run(config, command, BEGAN), together=True)
  except UserError as error:
    code, message = 2, f"error: {error}"
  except (Failure, OSError) as error:
    code, message = 1, f"error: {error}"
  except KeyboardInterrupt:
    code, message = 130, interrupts.STOPPED
  except Exception as error:
    if not hosts.is_loss(error):
      raise
    return hosts.leave(hosts.wait_for_verdict(error, config.peer_timeout), together=False)
  print(message, file=sys.stderr)
  return hosts.leave(code, together=False)


def run(
  config: Any,
  command: Sequence[str] = ("python", "-m", "examples.train"),
  began: float | None = None,
) -> int:
  """Trains as `config` says, or goes on with it; `command` is what starts this run again."""
  clock = Clock("starting", began)
  console = Console(soft_wrap=True, highlight=False, quiet=not hosts.is_first())

  # Whatever can be wrong is found here, before any work.
  devices = choose_devices(config.devices)
  settings.check(config, len(devices))
  parallel = parallelism.create(config, devices)
  accumulation = config.microbatches, config.microbatch_statistics
  dataset, batches = hosts.in_turn(lambda: load(config))
  if config.diagnose_every:
    diagnose.check(config, dataset)
  image_shape = dataset.train_images.shape[1:]
  axes = microbatches.axes(parallel.axis_name, *accumulation)
  virtual = settings.virtual_batch_size(config, len(devices))
  model = models.create(config, image_shape, len(dataset.class_names), axes, virtual)
  decays = models.decays(model, image_shape)
  optimizer = optimizers.create(config, decays)
  directory = Path(config.workdir)
  changes = hosts.in_turn(lambda: run_directory.claim(directory, config, command))

  with (
    contextlib.closing(batches),
    interrupts.requests() as interrupt,
    checkpoints.Checkpoints(directory / "checkpoints", config.keep, console.print) as store,
  ):
    # Start from the seed, or from where the last run stopped.
    step = store.latest() or 0
    if step >= config.steps:
      show_finished(console, config, command, step)
      return 0
    state = steps.init_state(model, optimizer, config.seed, image_shape)
    console.print(reporting.header(config, state.params, devices, dataset))
    if step:
      forms = [state._replace(opt_state=f) for f in optimizers.forms(config, decays, state.params)]
      saved = store.restore(step, store.fitting(step, [state, *forms]), batches)
      state = saved._replace(opt_state=optimizers.carry_over(saved.opt_state, state.opt_state))
      console.print(f"Resuming {directory} after step {step} of {config.steps}.")
    if changes:
      console.print(f"From step {step} on: {run_directory.words(changes)}.")
      if hosts.is_first():
        run_directory.note(directory, config, changes, step)
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
    train_step = clock.first_call("compiling", train_step)
    eval_step = parallel.step(functools.partial(steps.eval_step, model=model))
    eval_step = clock.first_call("compiling", eval_step)

    checkups = None
    if config.diagnose_every and hosts.is_first():
      checkups = diagnose.Checkups(config, dataset, len(devices))
      note = clock.first_call("compiling", checkups.note)

    stop = hosts.Agreement()
    console.print("Compiling ...")
    clock.begin("training")
    with reporting.Reporter(directory, config, step, console, clock) as report:
      while step < config.steps and not stop.reached(bool(interrupt)):
        batch = parallel.shard(report.take(batches))
        state, sums = train_step(state, batch)
        step += 1
        report.stepped(step, sums)
        if checkups:
          note(step, state, batch)
          if step % config.diagnose_every == 0 or step == config.steps:
            with report.pause(step, "diagnosing"):
              report.diagnosed(step, checkups.diagnose(step, state))
        if step % config.eval_every == 0 or step == config.steps:
          with report.pause(step, "testing"):
            tests = data.test_batches(dataset, config.eval_batch_size, ShardByJaxProcess())
            report.tested(step, *steps.evaluate(eval_step, state, tests, parallel))
        if step % config.save_every == 0:
          with report.pause(step, "saving"):
            store.save(step, finite(step, state, config), batches)
      with report.pause(step, "saving"):
        store.save(step, finite(step, state, config), batches)
    clock.begin("finishing")

  if hosts.is_first():
    draw(config, report.rows)
  if step < config.steps:
    console.print(f"Interrupted: saved after step {step} of {config.steps}. {to_go_on(command)}")
    return 128 + (interrupt.signal or signal.SIGTERM)  # which another process was sent
  show_result(console, config, report.rows, step)
  waiting = report.waiting / max(clock["training"], 1e-9)
  console.print(f"{clock.report()} {waiting:.2%} of the training was waiting for input.")
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


def finite(step: int, state: Any, config: Any) -> steps.TrainState:
  """The state on the host, if there is no NaN or infinity in it: it would be saved for nothing."""
  state = steps.unreplicate(state)
  leaves = jax.tree.leaves((state.params, state.batch_stats))
  if not all(np.isfinite(leaf).all() for leaf in leaves):
    raise optimizers.not_finite(f"the network was no longer finite after step {step}", config)
  return state


def draw(config: Any, rows: list[dict[str, Any]]) -> None:
  """Draws the curves of a run, all of them or nothing."""
  title = f"{config.model} on {config.dataset}"
  if config.label_smoothing:
    title += f" (training labels smoothed by {config.label_smoothing})"
  draft = Path(config.workdir) / f"draft-{CURVES}"
  curves.draw(rows, draft, title)
  draft.replace(Path(config.workdir) / CURVES)


def to_go_on(command: Sequence[str]) -> str:
  """What starts this run again."""
  others = " in this process, and as before in the others" if jax.process_count() > 1 else ""
  if command[2:3] == ["examples.launch"]:
    others = ""  # which starts them all
  return f"To go on{others}: {command_line.changed(command)}"


def show_finished(console: Console, config: Any, command: Sequence[str], step: int) -> None:
  """Says that there is nothing left to do, and how more could be done."""
  directory, rows = Path(config.workdir), reporting.read_rows(Path(config.workdir))
  longer = command_line.changed(command, steps=2 * step)
  console.print(
    f"{directory} is finished already, after {step} steps. To go on for longer: {longer}"
  )
  if hosts.is_first() and not (directory / CURVES).exists():  # killed before it was drawn
    draw(config, rows)
  show_result(console, config, rows, step)


def show_result(console: Console, config: Any, rows: list[dict[str, Any]], step: int) -> None:
  """Says how well the network does, and where the rest is."""
  accuracy = reporting.latest(rows, "test/accuracy")
  examples = reporting.latest(rows, "test/examples")
  console.print(
    f"Test accuracy {accuracy:.2%} on {examples} examples after {step} steps of "
    f"{config.batch_size}; curves, metrics, TensorBoard logs and checkpoints are in "
    f"{config.workdir}."
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv))
