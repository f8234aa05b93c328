"""Who makes the others wait is said alike by all processes, whatever their own clocks say."""

from tests import processes

WORKER = """
import time
from types import SimpleNamespace
from engine.observe.stragglers import MIN_STEPS, Stragglers
from engine.runtime import activity
from engine.runtime.distributed import init_process_group, shutdown

world = init_process_group(20)
told = []
run = SimpleNamespace(world=world, say=told.append)
stragglers = Stragglers()
stragglers.on_start(run, 0)
for step in range(MIN_STEPS):
    activity.current.enter("forward", step)
    time.sleep(0.02 if world.rank else 0.001)
    activity.current.enter("backward")
    stragglers.on_step(run, step, None)
# by its own clock one process would say something and the other not: both have to take part in the same collectives
stragglers.on_log(run, MIN_STEPS, {"seconds_per_step": 0.02 if world.rank else 60.0})
stragglers.on_log(run, MIN_STEPS + 1, {"seconds_per_step": 0.02})
print(len(told), *told)
shutdown(world)
"""


def test_processes_with_other_clocks_do_not_wait_for_each_other():
    codes, (first, second) = processes.run(["-c", WORKER], world_size=2, timeout=60)
    assert codes == [0, 0]
    assert first.splitlines()[-1] == "0"
    assert second.splitlines()[-1].startswith("1 slow: rank 1 (")
    assert "s of each step for forward, the others 0.00 s" in second
