"""
The application of `blockgen-hf serve` on many replicas, and machines, with Ray Serve.

    pip install 'blockgen-hf[serve]' 'ray[serve]'
    python examples/serve_ray.py --model tinystories-masked --replicas 2
    python examples/serve_ray.py --model my-name/my-model --replicas 1 --max-replicas 8 --gpus 1

Each replica has a model and batches of its own; Ray gives a request to the replica with fewer of them. On a cluster,
run `ray start --head` on one machine and `ray start --address=...` on the others before. In a configuration file of
Ray (`serve deploy`), the import path is `examples.serve_ray:application`, with `args`.
"""

import argparse
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application


def application(args: dict[str, Any]) -> Application:
    """
    Args:
        args: `model`, and what is in [`DEFAULTS`].
    """
    options = {**DEFAULTS, **args}
    rows, queue = int(options["max_batch_rows"]), int(options["max_queue"])
    replicas, most = int(options["replicas"]), int(options["max_replicas"] or options["replicas"])

    def build() -> FastAPI:
        """In each replica."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from blockgen_hf.checkpoints import find_checkpoint
        from blockgen_hf.serving.app import create_app
        from blockgen_hf.serving.service import ServerOptions

        source = find_checkpoint(options["model"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        name = options["model"].rstrip("/").rpartition("/")[2]
        return create_app(model, tokenizer, ServerOptions(name, max_batch_rows=rows, max_queue=queue))

    deployment = serve.deployment(
        name="blockgen",
        # More replicas when those there are have full batches, fewer when they have been idle for a while.
        autoscaling_config={
            "min_replicas": replicas,
            "initial_replicas": replicas,
            "max_replicas": most,
            "target_ongoing_requests": rows,
            "upscale_delay_s": 30,
            "downscale_delay_s": 600,
        },
        max_ongoing_requests=rows + queue,  # the application says itself, with a 429, when its queue is full
        graceful_shutdown_timeout_s=60,  # for requests that run when a replica has to go
        ray_actor_options={"num_cpus": float(options["cpus"]), "num_gpus": float(options["gpus"])},
    )
    return deployment(serve.ingress(build)()).bind()


DEFAULTS: dict[str, Any] = {
    "model": "tinystories-masked",
    "replicas": 1,
    "max_replicas": None,
    "cpus": 1,
    "gpus": 0,
    "max_batch_rows": 64,
    "max_queue": 128,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in DEFAULTS.items():
        kind = str if isinstance(value, str) else float if name in ("cpus", "gpus") else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = vars(parser.parse_args())
    ray.init(ignore_reinit_error=True)
    serve.start(http_options={"host": args.pop("host"), "port": args.pop("port")})
    serve.run(application(args), name="blockgen", route_prefix="/", blocking=True)


if __name__ == "__main__":
    main()
