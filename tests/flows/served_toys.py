"""A process that serves the toy lifecycle as a Prefect deployment, for the retry test."""

import os

import toys
from prefect import flow, serve

from flows.config import RunConfig
from flows.prefect_call import PrefectCall, flow_run_id
from flows.run import Run


@flow(name="toy-line", persist_result=False)
def toy_flow() -> None:
    specs = toys.toy_line(report=toys.ToyConfig(fail_unless=os.environ["TOY_READY"]))
    root = os.environ["TOY_ROOT"]
    run = Run(flow_run_id("toy"), specs, RunConfig(root=root), {"name": "toy"}, catalog=toys.toy_function)
    run.execute(PrefectCall(root))


if __name__ == "__main__":
    serve(toy_flow.to_deployment("toy"), print_starting_message=False)
