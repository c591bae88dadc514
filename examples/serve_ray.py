"""
The application of `blockgen-hf serve` on many replicas, and machines, with Ray Serve.

    pip install 'blockgen-hf[serve]' 'ray[serve]'
    python examples/serve_ray.py tinystories-masked --replicas 2
    python examples/serve_ray.py my-name/my-model --replicas 1 --max-replicas 8 --gpus 1

It takes the options of `blockgen-hf serve`, limits, keys and origins too, for each replica. A replica has a model and
batches of its own; Ray gives a request to the replica with fewer of them. On a cluster, run `ray start --head` on one
machine and `ray start --address=...` on the others before. In a configuration file of Ray (`serve deploy`), the import
path is `examples.serve_ray:application`; `args` has the same options, such as `max_queue: 64`.
"""

import argparse
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from blockgen_hf.cli.parsing import integer
from blockgen_hf.cli.serve import add_arguments, load_app, server_options


def application(args: dict[str, Any]) -> Application:
    """
    Args:
        args: options of [`parser`]; those that are not there have their defaults.
    """
    known = vars(parser().parse_args([]))
    if unknown := args.keys() - known.keys():
        raise ValueError(f"Unknown options {sorted(unknown)}: there are {sorted(known)}.")
    options = argparse.Namespace(**{**known, **args})
    of_server = server_options(options)  # here, as the key may be in this machine's environment only

    def build() -> FastAPI:
        """In each replica."""
        return load_app(options, of_server)

    deployment = serve.deployment(
        name="blockgen",
        # More replicas when those there are have full batches, fewer when they have been idle for a while.
        autoscaling_config={
            "min_replicas": options.replicas,
            "initial_replicas": options.replicas,
            "max_replicas": options.max_replicas or options.replicas,
            "target_ongoing_requests": options.max_batch_rows,
            "upscale_delay_s": 30,
            "downscale_delay_s": 600,
        },
        # More than a replica takes: what is too much has to reach it to get its 429. Ray would let it wait.
        max_ongoing_requests=2 * (options.max_batch_rows + options.max_queue),
        graceful_shutdown_timeout_s=options.shutdown_timeout,  # for requests that run when a replica has to go
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    return deployment(serve.ingress(build)()).bind()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(made)
    group = made.add_argument_group("replicas")
    group.add_argument("--replicas", type=integer(1), default=1, metavar="N", help="at least so many (default: 1)")
    group.add_argument("--max-replicas", type=integer(1), metavar="N", help="at most so many (default: --replicas)")
    group.add_argument("--cpus", type=float, default=1, metavar="N", help="of a replica (default: 1)")
    group.add_argument("--gpus", type=float, default=0, metavar="N", help="of a replica (default: 0)")
    return made


def main() -> None:
    args = vars(parser().parse_args())
    ray.init(ignore_reinit_error=True)
    serve.start(http_options={"host": args["host"], "port": args["port"]})
    serve.run(application(args), name="blockgen", route_prefix="/", blocking=True)


if __name__ == "__main__":
    main()
