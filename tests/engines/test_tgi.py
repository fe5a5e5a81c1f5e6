"""TGI: what is run, asked and heard. Tables; `recorded/tgi` holds what TGI says when it fails, line by line."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from gateway.catalog import ModelSpec
from gateway.engines.base import Call
from gateway.engines.tgi import DEFAULT_IMAGE, Tgi
from gateway.engines.tgi_answers import UNKNOWN_PROMPT_TOKENS
from gateway.engines.tgi_diagnoses import SYMPTOMS, diagnose, message_of, redacted
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    StartFailed,
    Unsupported,
    UpstreamFailed,
)
from gateway.generation import (
    Chat,
    Finished,
    GenerationRequest,
    Image,
    JsonObject,
    JsonSchema,
    Message,
    PromptToken,
    Regex,
    TokenEvent,
    Tool,
    ToolCall,
    collect,
)
from gateway.runtimes.base import Container, Exit, Mount, Progress

ENGINE = Tgi("hf_gateways")
RECORDED = Path(__file__).with_name("recorded") / "tgi"
CACHE = Mount("tgi-hub-cache", "/data")


def spec(**more: Any) -> ModelSpec:
    return ModelSpec(**{"id": "m", "hf_name": "acme/model-7b", **more})


def ask(**more: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "Hello", "max_new_tokens": 5, "temperature": 0.7, **more})


# ---- what is run ----


def test_a_launch_of_a_plain_model() -> None:
    launch = ENGINE.launch(spec(), "tgi-m", "s3cret")
    assert launch.name == "tgi-m"
    assert launch.model == "m"
    assert launch.command == (
        *("--model-id", "acme/model-7b", "--num-shard", "1", "--port", "8080", "--json-output", "--usage-stats", "off"),
        *("--max-top-n-tokens", "50", "--max-concurrent-requests", "256"),
    )
    assert launch.env == {}
    assert launch.container == Container(
        DEFAULT_IMAGE, port=8080, mounts=(CACHE,), secrets={"HF_TOKEN_PATH": "hf_gateways"}, shm_bytes=2**30
    )
    assert "s3cret" not in repr(launch)


def test_a_launch_of_a_model_with_everything() -> None:
    chosen = spec(
        revision="abc123",
        image="registry.local/tgi:1",
        pull_policy="never",
        gpus=["0", "1"],
        max_concurrency=3,
        context_tokens=4096,
        shm_size="2GiB",
        memory="32GiB",
        args={"quantize": "awq", "max_batch_prefill_tokens": 2048, "trust-remote-code": True, "usage-stats": True},
        env={"LOG_LEVEL": "info"},
        volumes=["/srv/models:/models:ro", "hub:/data/"],
    )
    launch = ENGINE.launch(chosen, "tgi-m", "s")
    assert launch.command == (
        *("--model-id", "acme/model-7b", "--revision", "abc123", "--num-shard", "2", "--port", "8080", "--json-output"),
        *("--usage-stats", "on", "--max-top-n-tokens", "50", "--max-concurrent-requests", "6"),
        *("--max-total-tokens", "4096", "--max-batch-prefill-tokens", "2048", "--quantize", "awq"),
        "--trust-remote-code",
    )
    assert launch.env == {"LOG_LEVEL": "info"}
    assert launch.container == Container(
        "registry.local/tgi:1",
        "never",
        port=8080,
        mounts=(Mount("/srv/models", "/models", read_only=True), Mount("hub", "/data")),
        secrets={"HF_TOKEN_PATH": "hf_gateways"},
        shm_bytes=2**31,
        memory_bytes=2**35,
    )


@pytest.mark.parametrize(("gpus", "shards"), [(0, "1"), (1, "1"), (4, "4"), (["2"], "1"), (["GPU-a", "GPU-b"], "2")])
def test_a_model_is_split_over_its_gpus_and_this_is_always_said(gpus: Any, shards: str) -> None:
    command = ENGINE.launch(spec(gpus=gpus), "m", "s").command
    assert command[command.index("--num-shard") + 1] == shards


@pytest.mark.parametrize(
    ("args", "said", "env"),
    [
        ({"max-total-tokens": 2048}, ["--max-total-tokens", "2048"], {}),
        ({"max_concurrent_requests": 7}, ["--max-concurrent-requests", "7"], {}),
        ({"cuda-memory-fraction": 0.45}, ["--cuda-memory-fraction", "0.45"], {}),
        ({"disable-grammar-support": True}, ["--disable-grammar-support"], {}),
        ({"sharded": False}, ["--sharded", "false"], {}),
        ({"otlp-service-name": "my models"}, [], {"OTLP_SERVICE_NAME": "my models"}),
        ({"tokenizer_config_path": "/x/*.json"}, [], {"TOKENIZER_CONFIG_PATH": "/x/*.json"}),
        ({"lora-adapters": "a/[b]"}, [], {"LORA_ADAPTERS": "a/[b]"}),
        ({"otlp-endpoint": ""}, [], {"OTLP_ENDPOINT": ""}),
    ],
)
def test_args_become_flags_and_what_a_shell_would_spoil_goes_by_environment(
    args: dict[str, Any], said: list[str], env: dict[str, str]
) -> None:
    launch = ENGINE.launch(spec(args=args, context_tokens=4096), "m", "s")
    flag = said[0] if said else f"--{next(iter(args)).replace('_', '-')}"
    assert launch.command.count(flag) == (1 if said else 0)
    start = launch.command.index(flag) if said else 0
    assert list(launch.command[start : start + len(said)]) == said
    assert launch.env == env


def test_a_flag_that_is_false_is_left_out() -> None:
    command = ENGINE.launch(spec(args={"disable-custom-kernels": False}), "m", "s").command
    assert not any("custom" in word for word in command)


@pytest.mark.parametrize(
    "key", ["model-id", "revision", "num_shard", "port", "hostname", "json-output", "api-key", "api_key"]
)
def test_flags_that_the_gateway_needs_for_itself_are_refused(key: str) -> None:
    with pytest.raises(StartFailed, match=f"args of m sets {key.replace('_', '-')}, but .* Remove") as failure:
        ENGINE.launch(spec(args={key: "Se3cret"}), "m", "s")
    assert "Se3cret" not in str(failure.value.extra) + failure.value.detail
    assert failure.value.extra["fix"].endswith("`args` of this model in models.yaml.")


@pytest.mark.parametrize("name", ["API_KEY", "PORT", "HOSTNAME", "MODEL_ID"])
def test_environment_that_would_do_the_same_is_refused(name: str) -> None:
    chosen = spec(env={name: "Se3cret"})
    with pytest.raises(StartFailed, match=f"env of m sets {name}, but"):
        ENGINE.launch(chosen, "m", "s")
    with pytest.raises(StartFailed, match=f"env of m sets {name}, but"):
        ENGINE.download(chosen, "m")


@pytest.mark.parametrize(
    ("gateways", "env", "token"),
    [
        (None, {}, None),
        ("hf_a", {}, "hf_a"),
        (SecretStr("hf_a\n"), {}, "hf_a"),
        ("hf_a", {"HF_TOKEN": "hf_b"}, "hf_b"),
        ("hf_a", {"HUGGING_FACE_HUB_TOKEN": "hf_b"}, "hf_b"),
        ("hf_a", {"HF_TOKEN": "hf_b", "HF_API_TOKEN": "hf_c"}, "hf_c"),
        ("hf_a", {"HF_TOKEN": ""}, None),
        ("", {}, None),
    ],
)
def test_a_token_is_a_file_and_never_in_the_environment(gateways: Any, env: dict[str, str], token: str | None) -> None:
    engine = Tgi(gateways)
    for launch in (engine.launch(spec(env=env), "m", "s"), engine.download(spec(env=env), "m")):
        assert launch is not None
        assert launch.container is not None
        assert launch.container.secrets == ({"HF_TOKEN_PATH": token} if token else {})
        assert not any("TOKEN" in name for name in launch.env)
        assert "hf_" not in repr(launch).replace("hf_hub", "")


def test_a_token_file_of_the_catalog_s_own_stays() -> None:
    launch = ENGINE.launch(spec(env={"HF_TOKEN_PATH": "/run/token"}), "m", "s")
    assert launch.env == {"HF_TOKEN_PATH": "/run/token"}
    assert launch.container is not None
    assert launch.container.secrets == {}


def test_a_volume_may_be_named_and_comes_beside_the_cache() -> None:
    launch = ENGINE.launch(spec(volumes=["models:/models"]), "m", "s")
    assert launch.container is not None
    assert launch.container.mounts == (Mount("models", "/models"), CACHE)


@pytest.mark.parametrize("target", ["/models", "/models/", "/models//.", "//models", "/a/../models"])
def test_a_volumes_target_is_the_same_however_it_is_written(target: str) -> None:
    launch = ENGINE.launch(spec(volumes=[f"models:{target}:rw"]), "m", "s")
    assert launch.container is not None
    assert launch.container.mounts == (Mount("models", "/models"), CACHE)


def test_equal_models_have_equal_launches_whatever_the_order_in_the_file() -> None:
    one = spec(args={"dtype": "float16", "speculate": 2}, env={"A": "1", "B": "2"})
    other = spec(args={"speculate": 2, "dtype": "float16"}, env={"B": "2", "A": "1"})
    assert repr(ENGINE.launch(one, "m", "s")) == repr(ENGINE.launch(other, "m", "another"))
    assert list(ENGINE.launch(one, "m", "s").env) == list(ENGINE.launch(other, "m", "s").env)


def test_a_download_fetches_the_same_files_to_the_same_place_and_serves_nobody() -> None:
    chosen = spec(revision="abc", gpus=2, args={"trust_remote_code": True}, memory="8GiB", env={"HF_ENDPOINT": "x"})
    launch, download = ENGINE.launch(chosen, "m", "s"), ENGINE.download(chosen, "pull-m")
    assert download is not None
    assert download.name == "pull-m"
    assert download.command == (
        *("download-weights", "acme/model-7b", "--json-output", "--revision", "abc", "--trust-remote-code"),
    )
    assert download.env == {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_ENDPOINT": "x"}
    assert download.gpus == ()
    assert (launch.container, download.container) == (
        Container(
            DEFAULT_IMAGE,
            port=8080,
            mounts=(CACHE,),
            secrets={"HF_TOKEN_PATH": "hf_gateways"},
            shm_bytes=2**30,
            memory_bytes=2**33,
        ),
        Container(
            DEFAULT_IMAGE,
            entrypoint=("text-generation-server",),
            port=None,
            mounts=(CACHE,),
            secrets={"HF_TOKEN_PATH": "hf_gateways"},
            shm_bytes=2**30,
            memory_bytes=2**33,
        ),
    )


# ---- how it comes up ----


@pytest.mark.parametrize(
    ("status", "ready", "alive"),
    [(200, True, True), (429, False, True), (503, False, False), (500, False, False), (404, False, False)],
)
def test_health_tells_ready_and_alive_apart(status: int, ready: bool, alive: bool) -> None:
    assert ENGINE.is_ready(status, b"") is ready
    assert ENGINE.is_alive(status, b"") is alive


def of_launcher(message: str) -> str:
    record = {"level": "INFO", "fields": {"message": message}, "target": "text_generation_launcher"}
    return json.dumps({"timestamp": "2025-09-02T17:58:51.532887Z", **record, "span": {"name": "download"}})


def of_router(message: str) -> str:
    record = {"level": "INFO", "message": message, "target": "text_generation_router_v3"}
    return json.dumps({"timestamp": "2025-09-02T17:58:51.532887Z", **record, "line_number": 125})


def of_loguru(message: str) -> str:
    return json.dumps({"text": f"{message}\n", "record": {"level": {"name": "INFO"}, "message": message}})


def as_text(message: str) -> str:
    origin = "\x1b[1mshard-manager\x1b[0m: \x1b[2mtext_generation_launcher\x1b[0m\x1b[2m:\x1b[0m"
    return f"\x1b[2m2025-09-02T17:58:51.532887Z\x1b[0m \x1b[32m INFO\x1b[0m {origin} {message}"


@pytest.mark.parametrize("form", [of_launcher, of_router, of_loguru, as_text, str])
@pytest.mark.parametrize(
    ("message", "progress"),
    [
        ("Starting check and download process for acme/model-7b", Progress("downloading")),
        ("Download: [2/5] -- ETA: 0:01:12", Progress("downloading", 2, 5, "files")),
        ("Download: [5/5] -- ETA: 0", Progress("downloading", 5, 5, "files")),
        ("Convert: [1/2] -- Took: 0:00:12", Progress("converting", 1, 2, "files")),
        ("Starting shard", Progress("loading")),
        ("Waiting for shard to be ready... rank=1", Progress("loading")),
        ("Shard ready in 18.012s rank=0", Progress("loading")),
        ("Starting Webserver", Progress("starting")),
        ("Warming up model", Progress("warming up")),
        ("KV-cache blocks: 31000, size: 1", Progress("warming up")),
        ("Cuda Graphs are enabled for sizes [32, 16]", Progress("warming up")),
        ("Setting max batch total tokens to 31000", Progress("starting")),
        ("Using the Hugging Face API", Progress("starting")),
        ("Serving revision 0123 of model acme/model-7b", Progress("starting")),
        ("Connected", Progress("ready")),
        ("Args {\n    model_id: 'Connected'\n}", None),
        ("Download file: model.safetensors", None),
        ("Not Connected", None),
        ("Success", None),
        ("", None),
    ],
)
def test_lines_of_every_form_tell_of_progress(form: Any, message: str, progress: Progress | None) -> None:
    assert ENGINE.progress(form(message)) == progress


def test_a_record_that_was_cut_is_read_as_far_as_it_goes() -> None:
    line = of_launcher('Error when initializing model\nTraceback:\n  no "model"' + "x" * 9000)[:200] + " [cut]"
    assert message_of(line).splitlines()[:2] == ["Error when initializing model", "Traceback:"]


NOISE = st.one_of(
    st.text(max_size=300),
    st.text(max_size=50).map(of_launcher),
    st.sampled_from(['{"fields":7}', '{"message":[1]}', '{"record":null}', "{" * 5000, '{"a":' * 3000, "{}", "[]"]),
)


@settings(derandomize=True)
@given(st.lists(NOISE, max_size=8), st.one_of(st.none(), st.integers(-64, 255)), st.text(max_size=60))
def test_no_output_is_too_strange_to_be_read(lines: list[str], code: int | None, reason: str) -> None:
    for line in lines:
        ENGINE.progress(line)
    diagnosis = ENGINE.diagnose(Exit(code, reason, tuple(lines)))
    assert diagnosis.cause
    assert diagnosis.fix
    assert len(diagnosis.evidence) <= 8
    assert all(len(line) <= 303 for line in diagnosis.evidence)


# ---- why it ended ----

ENDS = {
    "bad_token": ("refuses the token", "huggingface.co/settings/tokens"),
    "malformed_token": ("refuses the token", "HF_TOKEN of the gateway"),
    "token_without_gated_right": ("lacks the right to read gated", "Allow the token"),
    "gated_no_token": (
        "acme/model-7b is gated, and the hub was asked without",
        "licence at huggingface.co/acme/model-7b,",
    ),
    "gated_refused": ("acme/model-7b is gated, and the token's account", "at huggingface.co/acme/model-7b with"),
    "gated_awaiting": ("acme/model-7b is gated, and the token's account", "ask for access"),
    "gated_unnamed": ("is gated", "Accept its licence"),
    "no_revision": ("no such revision", "`revision`"),
    "no_repository": ("no repository acme/model-7b,", "`hf_name`"),
    "no_repository_unnamed": ("no such repository", "`hf_name`"),
    "no_such_directory": ("nor a directory in the container", "`volumes`"),
    "shared_memory": ("shared memory is too small", "`shm_size`"),
    "disk_full": ("the disk is full", "Make room"),
    "read_only_cache": ("/data/hub/models--acme--model-7b in the container cannot be written", "`volumes`"),
    "certificate": ("does not trust the certificate", "REQUESTS_CA_BUNDLE"),
    "offline": ("HF_HUB_OFFLINE forbids", "Remove HF_HUB_OFFLINE"),
    "rate_limited": ("refuses so many downloads", "Wait some minutes"),
    "hub_down": ("the hub fails (status 503)", "status.huggingface.co"),
    "no_network": ("cannot reach the Hugging Face hub", "HTTPS_PROXY"),
    "hf_transfer": ("hf_transfer does not say why", "{HF_HUB_ENABLE_HF_TRANSFER: 0}"),
    "download_killed": ("the download was killed by signal 9", "`memory`"),
    "access_refused": ("refuses access (status 403)", "HF_TOKEN"),
    "no_weights": ("acme/model-7b has no weights", "engine llamacpp"),
    "no_local_weights": ("directory of the model has no weights", "`hf_name` and `volumes`"),
    "pickled_weights": ("only pickled weights", "{trust-remote-code: true}"),
    "conversion_failed": ("could not be converted", ".safetensors"),
    "damaged_weights": ("truncated or damaged", "Delete the model's directory"),
    "remote_code": ("Python code of its own", "{trust-remote-code: true}"),
    "lora": ("LoRA adapter acme/lora@a@b", "{lora-adapters: ...}"),
    "lora_other_model": ("LoRA adapter acme/lora cannot", "{lora-adapters: ...}"),
    "unknown_quantization": ("no quantisation gguf", "{quantize: ...}"),
    "not_quantized": ("not quantised in the way", "{quantize: ...}"),
    "quantization_unsupported": ("gptq quantization is not supported for AutoModel", "{quantize: ...}"),
    "quantization_needs_newer_gpu": ("CUDA capability 8.0 or later", "{quantize: ...}"),
    "weights_do_not_fit": ("lack model.layers.0.self_attn.q_proj.weight", "{quantize: ...}"),
    "unsupported_model": ("models of type mamba3", "newer `image`"),
    "unknown_to_transformers": ("models of type mistral9", "newer `image`"),
    "heads_do_not_divide": ("cannot be split over that many GPUs", "`gpus`"),
    "driver_too_old": ("driver of the machine is too old", "Update the driver"),
    "gpu_too_old": ("no code for this kind of GPU", "`image`"),
    "fabric_manager": ("GPUs are not ready", "nvidia-fabricmanager"),
    "no_gpu": ("sees no GPU", "NVIDIA Container Toolkit"),
    "no_gpu_flash_attention": ("sees no GPU that TGI can use", "NVIDIA Container Toolkit"),
    "fewer_gpus": ("fewer GPUs", "`gpus`"),
    "not_enough_devices": ("fewer GPUs", "`gpus`"),
    "needs_flash_attention": ("needs kernels (Flash Attention)", "compute capability 8.0"),
    "one_request_too_large": ("a single request of full length", "context_tokens"),
    "prefill_too_large": ("8242 tokens of prompts", "{max-batch-prefill-tokens: ...}"),
    "gpu_memory_at_warm_up": ("ran out while the model warmed up", "{max-batch-prefill-tokens: ...}"),
    "gpu_memory_while_serving": ("ran out while it served", "{cuda-memory-fraction: 0.9}"),
    "gpu_memory_at_load": ("does not fit into the GPU's memory", "lower context_tokens"),
    "host_memory": ("ran out while the model loaded", "`memory`"),
    "shard_killed_while_serving": ("was killed from outside", "`memory`"),
    "old_processor": ("an instruction that this machine's processor lacks", "AVX2"),
    "shard_segfault": ("crashed with signal 11", "another `image`"),
    "illegal_access": ("failed while it served: an illegal memory access was encountered", "nvidia-smi"),
    "gpu_error_at_load": ("failed while the model started: uncorrectable ECC error", "nvidia-smi"),
    "nccl": ("cannot talk to each other (NCCL)", "{NCCL_P2P_DISABLE: 1}"),
    "unknown_flag": ("no flag --max-imput-tokens", "`args`"),
    "wrong_value": ("the flag --dtype cannot have this value", "`args`"),
    "wrong_usage": ("cannot be used multiple times", "`args`"),
    "limits": ("limits do not go together: `max_input_tokens must be < `max_total_tokens`", "context_tokens"),
    "limits_in_router": ("`max_batch_prefill_tokens` must be >= `max_input_tokens`", "context_tokens"),
    "metrics_port": ("metrics port was taken", "{prometheus-port: ...}"),
    "port": ("its port was taken", "Start the model again"),
    "tokenizer": ("tokenizer cannot be loaded", "{tokenizer-config-path: ...}"),
    "not_an_image_of_tgi": ("not a complete image of TGI", "`image`"),
    "shard_crashed": ("(shard 0) crashed while it served (RuntimeError: shape", "gateway logs"),
    "shard_failed": ("cannot be loaded (KeyError: 'rope_theta')", "gateway logs"),
    "download_failed": ("cannot be downloaded (ValueError: something new)", "gateway logs"),
    "web_server_crashed": ("web server crashed", "gateway logs"),
    "text_gpu_memory_at_load": ("does not fit into the GPU's memory", "lower context_tokens"),
    "text_gated": ("acme/model-7b is gated", "licence at huggingface.co/acme/model-7b,"),
    "download_alone_no_repository": ("no repository acme/model-7b,", "`hf_name`"),
    "download_alone_flag": ("no flag --json-output", "`args`"),
    "retried_download_then_no_memory": ("does not fit into the GPU's memory", "lower context_tokens"),
}


def said(name: str) -> tuple[str, ...]:
    return tuple((RECORDED / f"{name}.log").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", ENDS)
def test_a_failed_server_is_diagnosed_from_what_it_said(name: str) -> None:
    cause, fix = ENDS[name]
    diagnosis = ENGINE.diagnose(Exit(1, "exit status 1", said(name)))
    assert cause in diagnosis.cause
    assert fix in diagnosis.fix
    assert diagnosis.evidence
    assert not any(line.startswith(("{", "Args")) or "\x1b" in line or "\n" in line for line in diagnosis.evidence)
    assert "{0}" not in diagnosis.cause + diagnosis.fix


def test_every_symptom_is_shown_by_a_recording_and_every_recording_is_used() -> None:
    causes = [ENGINE.diagnose(Exit(1, "exit status 1", said(name))).cause for name in ENDS]
    unseen = [s.cause for s in SYMPTOMS if not any(c.startswith(s.cause.partition("{0}")[0]) for c in causes)]
    assert unseen == []
    assert {path.stem for path in RECORDED.glob("*.log")} == ENDS.keys()


def test_the_evidence_shows_what_the_cause_was_read_from() -> None:
    diagnosis = ENGINE.diagnose(Exit(1, "exit status 1", said("gated_no_token")))
    assert diagnosis.evidence == (
        "GatedRepoError: 401 Client Error. (Request ID: Root=1-67;c8)",
        "Access to model acme/model-7b is restricted. You must have access to it and be",
        "Error: DownloadError",
    )


@pytest.mark.parametrize(
    ("code", "reason", "cause", "fix"),
    [
        (
            137,
            "killed: out of memory (the container's memory limit; killed by SIGKILL)",
            "reached the limit of its memory",
            "`memory`",
        ),
        (1, "killed: out of memory (the container's memory limit)", "reached the limit of its memory", "`memory`"),
        (None, "removed by somebody else", "its container was removed by somebody else", "docker rm"),
        (None, "restarted by somebody else", "its container was restarted by somebody else", "docker restart"),
        (None, "removed by the gateway", "the gateway itself ended it", "Start the model again"),
        (137, "killed by SIGKILL by the gateway", "the gateway itself ended it", "Start the model again"),
        (137, "killed by SIGKILL", "killed from outside (SIGKILL)", "docker kill"),
        (137, "exit status 137", "killed from outside (SIGKILL)", "`memory`"),
        (0, "exit status 0", "asked to stop from outside", "`gateway stop`"),
        (143, "killed by SIGTERM", "asked to stop from outside", "`gateway stop`"),
        (139, "killed by SIGSEGV", "segmentation fault", "another `image`"),
        (127, "exit status 127", "no program of TGI's", "`image`"),
        (1, "exit status 1", "without a known reason (exit status 1)", "gateway logs"),
        (None, "gone", "without a known reason (gone)", "gateway logs"),
    ],
)
def test_a_server_that_said_nothing_is_diagnosed_from_its_end(
    code: int | None, reason: str, cause: str, fix: str
) -> None:
    diagnosis = ENGINE.diagnose(Exit(code, reason, ("one", of_router("two"))))
    assert cause in diagnosis.cause
    assert fix in diagnosis.fix
    assert diagnosis.evidence == ("one", "two")


def test_who_was_killed_from_outside_is_not_blamed_for_what_it_said_before() -> None:
    diagnosis = ENGINE.diagnose(Exit(137, "killed by SIGKILL", said("gpu_memory_at_load")))
    assert "killed from outside" in diagnosis.cause


def test_no_token_is_ever_quoted() -> None:
    for name in ENDS:
        diagnosis = ENGINE.diagnose(Exit(1, "exit status 1", said(name)))
        assert "hf_abcdef" not in repr(diagnosis)
    assert redacted("a hf_abcdefghijklmnopqrst b") == "a *** b"
    assert redacted("Authorization: Bearer abc.def x") == "Authorization: Bearer *** x"
    assert redacted("proxy http://me:secret@proxy:3128/") == "proxy http://***@proxy:3128/"
    assert (
        redacted("hf_hub_download hf_transfer hf_raise_for_status") == "hf_hub_download hf_transfer hf_raise_for_status"
    )


def test_arguments_which_may_hold_keys_are_no_evidence() -> None:
    args = of_launcher('Args {\n    ngrok_authtoken: Some("s3cret"),\n}')
    assert "s3cret" not in repr(diagnose(Exit(1, "exit status 1", (args, "two"))))


# ---- what is asked ----


def deep(levels: int, last: str | None = None, definition: Any = None) -> dict[str, Any]:
    """Return a schema of so many levels; the last one names a definition, if it is given."""
    schema: dict[str, Any] = {"$ref": last} if last else {}
    for _ in range(levels):
        schema = {"items": schema}
    return {**schema, "$defs": {"D": definition}} if last else schema


def with_tools(choice: Any = "auto", name: str | None = None, **more: Any) -> Chat:
    return Chat(HELLO.messages, (WEATHER, CLOCK), choice, name, **more)


HELLO = Chat((Message("user", ("Hello",)),))
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
WEATHER = Tool("weather", "Tells it", PLACE)
CLOCK = Tool("clock")
ENDLESS = {"$defs": {"A": {"items": {"$ref": "#/$defs/A"}}}, "properties": {"a": {"$ref": "#/$defs/A"}}}
BILLIONS = {
    "$defs": {
        **{f"d{n}": {"prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}] * 10} for n in range(10)},
        "d10": {"type": "null"},
    },
    "properties": {"a": {"$ref": "#/$defs/d0"}},
}


def parameters_of(request: GenerationRequest) -> dict[str, Any]:
    body = json.loads(ENGINE.call(spec(), request, "s3cret").body)
    assert set(body) == {"inputs", "parameters"}
    return dict(body["parameters"])


def test_a_call_is_a_stream_without_a_key() -> None:
    call = ENGINE.call(spec(), ask(prompt="Gr\u00fc\u00df \U0001f600"), "s3cret")
    assert call.path == "/generate_stream"
    assert call.headers == {"Content-Type": "application/json"}
    assert json.loads(call.body) == {
        "inputs": "Gr\u00fc\u00df \U0001f600",
        "parameters": {"max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "details": True},
    }


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "details": True}
SAMPLED = {"max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "details": True}


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"temperature": 0.0}, GREEDY),
        ({"temperature": 0.0, "top_p": 0.5, "top_k": 3, "seed": 7}, GREEDY),
        ({"temperature": 0.0, "repetition_penalty": 1.2}, {**GREEDY, "repetition_penalty": 1.2}),
        ({"temperature": 1.0}, {**SAMPLED, "temperature": 1.0}),
        ({"temperature": 2.0}, {**SAMPLED, "temperature": 2.0}),
        ({"temperature": 0.001}, {**SAMPLED, "temperature": 0.01}),
        ({"top_p": 1.0}, SAMPLED),
        ({"top_p": 0.99999999}, SAMPLED),
        ({"top_p": 0.95, "top_k": 40}, {**SAMPLED, "top_p": 0.95, "top_k": 40}),
        ({"seed": 2**64 - 1}, {**SAMPLED, "seed": 2**64 - 1}),
        ({"seed": 0}, {**SAMPLED, "seed": 0}),
        ({"frequency_penalty": -0.5}, {**SAMPLED, "frequency_penalty": -0.5}),
        ({"top_tokens": 50}, {**SAMPLED, "top_n_tokens": 50}),
        ({"logprobs": True}, SAMPLED),
        ({"stop": ("x", "\n")}, SAMPLED),
        ({"max_new_tokens": None}, {name: value for name, value in SAMPLED.items() if name != "max_new_tokens"}),
        ({"grammar": Regex("a|b")}, {**SAMPLED, "grammar": {"type": "regex", "value": "a|b"}}),
        ({"grammar": JsonSchema(OBJECT, "x")}, {**SAMPLED, "grammar": {"type": "json", "value": OBJECT}}),
    ],
)
def test_what_a_caller_asks_for_is_sent_in_tgi_s_way(asked: dict[str, Any], sent: dict[str, Any]) -> None:
    assert parameters_of(ask(**asked)) == sent


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"top_tokens": 51}, "at most 50 top_tokens"),
        ({"top_tokens": 5, "top_p": 0.95}, "together with top_p:"),
        ({"top_tokens": 5, "top_k": 3, "frequency_penalty": 1.0}, "together with top_k, frequency_penalty:"),
        ({"top_tokens": 5, "temperature": 0.0, "repetition_penalty": 1.1}, "together with repetition_penalty:"),
        ({"top_tokens": 5, "temperature": 0.001}, "together with a temperature below 0.01:"),
        ({"top_tokens": 5, "grammar": Regex("a")}, "together with a grammar:"),
        ({"grammar": JsonObject()}, "give a json_schema"),
        ({"grammar": JsonSchema({"type": "string"})}, "`properties` at its top"),
        ({"grammar": JsonSchema({"properties": {"a": deep(200)}})}, "too deep"),
        ({"chat": HELLO, "top_k": 3}, "no top_k in chats"),
        ({"chat": HELLO, "repetition_penalty": 1.1}, "no repetition_penalty in chats"),
        ({"chat": HELLO, "repetition_penalty": 1.1, "top_k": 1}, "no top_k and no repetition_penalty in chats"),
        ({"chat": HELLO, "presence_penalty": -1.0}, "presence_penalty"),
        ({"chat": with_tools(), "grammar": Regex("a")}, "tools and keep to a grammar"),
        ({"chat": with_tools("required"), "grammar": JsonSchema(OBJECT)}, "set tool_choice to none"),
        ({"chat": Chat(HELLO.messages, (Tool("no_tool"),))}, "no_tool of its own"),
        ({"chat": Chat(HELLO.messages, (Tool("f", None, ENDLESS),))}, "tool f: its parameters contain themselves"),
        ({"chat": Chat(HELLO.messages, (Tool("f", None, BILLIONS),))}, "tool f: .* too large"),
        ({"chat": Chat(HELLO.messages, (Tool("f", None, deep(200)),))}, "tool f: .* too deep"),
        ({"chat": Chat(HELLO.messages, (Tool("f", None, deep(60, "#/$defs/D", deep(60))),))}, "tool f: .* too deep"),
    ],
)
def test_what_tgi_cannot_do_is_refused_by_name(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(Unsupported, match=named):
        ENGINE.check(spec(), ask(**asked))


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"top_p": 0.9, "top_k": 3, "repetition_penalty": 1.1, "frequency_penalty": -2.0, "logprobs": True},
        {"top_tokens": 50},
        {"top_tokens": 5, "temperature": 0.0, "top_p": 0.5, "top_k": 1},
        {"chat": HELLO, "temperature": 0.0, "top_k": 1, "top_tokens": 50, "logprobs": True},
        {"chat": HELLO, "grammar": Regex("a")},
        {"chat": with_tools(), "logprobs": True},
        {"chat": with_tools("none"), "grammar": JsonSchema(OBJECT)},
        {"chat": Chat(HELLO.messages, (Tool("no_tool"),), "none")},
        {"chat": with_tools(parallel_tool_calls=False)},
        {"chat": with_tools(parallel_tool_calls=True)},
        {"max_new_tokens": None, "grammar": JsonSchema({"properties": {}})},
    ],
)
def test_what_tgi_can_do_is_let_pass(asked: dict[str, Any]) -> None:
    ENGINE.check(spec(), ask(**asked))


def test_a_server_without_grammars_is_not_asked_for_them() -> None:
    for name in ("disable-grammar-support", "disable_grammar_support"):
        without = spec(args={name: True})
        for asked in ({"grammar": Regex("a")}, {"chat": with_tools()}, {"chat": HELLO, "grammar": JsonSchema(OBJECT)}):
            with pytest.raises(Unsupported, match="disable-grammar-support"):
                ENGINE.check(without, ask(**asked))
        ENGINE.check(without, ask(chat=with_tools("none")))
    ENGINE.check(spec(args={"disable-grammar-support": False}), ask(grammar=Regex("a")))


# ---- what is asked of a chat ----


def chat_body(request: GenerationRequest) -> dict[str, Any]:
    call = ENGINE.call(spec(api_key="sk-1"), request, "s3cret")
    assert call.path == "/v1/chat/completions"
    assert call.headers == {"Content-Type": "application/json", "Authorization": "Bearer sk-1"}
    return dict(json.loads(call.body))


ASKED: dict[str, Any] = {
    "model": "tgi",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 5,
    "temperature": 0.7,
    "stream": True,
    "stream_options": {"include_usage": True},
}
NOT_DRAWN = {**ASKED, "temperature": 0.0}
SAID_TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": PLACE}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
]
CALLING = {**ASKED, "tools": SAID_TOOLS}


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({}, ASKED),
        ({"max_new_tokens": None}, {name: value for name, value in ASKED.items() if name != "max_tokens"}),
        ({"temperature": 0.0, "top_p": 0.5, "top_k": 3, "seed": 7}, NOT_DRAWN),
        ({"temperature": 0.001}, {**ASKED, "temperature": 0.01}),
        ({"top_p": 1.0, "seed": 2**64 - 1}, {**ASKED, "seed": 2**64 - 1}),
        ({"top_p": 0.9}, {**ASKED, "top_p": 0.9}),
        ({"frequency_penalty": 0.5, "temperature": 0.0}, {**NOT_DRAWN, "frequency_penalty": 0.5}),
        ({"presence_penalty": 0.0, "repetition_penalty": 1.0, "stop": ("x",)}, ASKED),
        ({"logprobs": True}, {**ASKED, "logprobs": True}),
        ({"top_tokens": 3}, {**ASKED, "logprobs": True, "top_logprobs": 3}),
        ({"grammar": Regex("a|b")}, {**ASKED, "response_format": {"type": "regex", "value": "a|b"}}),
        ({"grammar": JsonSchema(OBJECT, "x")}, {**ASKED, "response_format": {"type": "json", "value": OBJECT}}),
        ({"chat": with_tools()}, {**CALLING, "tool_choice": "auto"}),
        ({"chat": with_tools(parallel_tool_calls=False)}, {**CALLING, "tool_choice": "auto"}),
        ({"chat": with_tools("required")}, {**CALLING, "tool_choice": "required"}),
        (
            {"chat": with_tools("required", "clock")},
            {**CALLING, "tool_choice": {"type": "function", "function": {"name": "clock"}}},
        ),
        ({"chat": with_tools("none")}, ASKED),
        (
            {"chat": with_tools("none"), "grammar": Regex("a")},
            {**ASKED, "response_format": {"type": "regex", "value": "a"}},
        ),
    ],
)
def test_a_chat_is_sent_in_tgi_s_way(asked: dict[str, Any], sent: dict[str, Any]) -> None:
    assert chat_body(ask(prompt="", **{"chat": HELLO, **asked})) == sent


CALL = ToolCall("c1", "clock", "{}")
SAID_CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (Message("assistant", (), tool_calls=(CALL,)), {"role": "assistant", "tool_calls": [SAID_CALL]}),
        (Message("assistant", ("",), tool_calls=(CALL,)), {"role": "assistant", "tool_calls": [SAID_CALL]}),
        (
            Message("assistant", ("I look.",), tool_calls=(CALL,)),
            {"role": "assistant", "content": f"I look.\n{json.dumps([SAID_CALL])}"},
        ),
        (Message("assistant"), {"role": "assistant", "content": ""}),
        (
            Message("tool", ("9:00",), tool_call_id="c1"),
            {"role": "tool", "content": "9:00", "tool_call_id": "c1"},
        ),
        (
            Message("user", ("What is ", Image("data:image/png;base64,AA"))),
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is "},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
                ],
            },
        ),
    ],
)
def test_no_part_of_a_turn_is_lost_to_tgi(message: Message, said: dict[str, Any]) -> None:
    assert chat_body(ask(chat=Chat((*HELLO.messages, message))))["messages"][1:] == [said]


def test_definitions_are_written_out_where_a_tool_names_them() -> None:
    parameters = {
        "$defs": {"Pet": {"type": "object", "properties": {"kind": {"$ref": "#/definitions/Kind"}}}},
        "definitions": {"Kind": {"enum": ["cat", "dog"], "title": "Kind"}},
        "type": "object",
        "properties": {
            "pet": {"$ref": "#/$defs/Pet", "description": "which"},
            "others": {"type": "array", "items": {"$ref": "#/$defs/Pet"}},
            "$ref": {"type": "string"},
            "far": {"$ref": "https://example.org/schema"},
        },
    }
    pet = {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"], "title": "Kind"}}}
    body = chat_body(ask(chat=Chat(HELLO.messages, (Tool("f", None, parameters),))))
    assert body["tools"][0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "pet": {**pet, "description": "which"},
            "others": {"type": "array", "items": pet},
            "$ref": {"type": "string"},
            "far": {"$ref": "https://example.org/schema"},
        },
    }


# ---- tokens of a prompt ----


def test_a_prompt_or_a_chat_is_cut_into_tokens_with_all_that_makes_it() -> None:
    plain = ENGINE.tokenize(spec(), ask(prompt="Gr\u00fc\u00df", max_new_tokens=None), "s")
    assert (plain.method, plain.path, json.loads(plain.body)) == ("POST", "/tokenize", {"inputs": "Gr\u00fc\u00df"})
    chat = ENGINE.tokenize(spec(api_key="sk-1"), ask(chat=with_tools("required")), "s")
    assert chat.path == "/chat_tokenize"
    assert chat.headers["Authorization"] == "Bearer sk-1"
    assert json.loads(chat.body) == {
        "model": "tgi",
        "messages": ASKED["messages"],
        "tools": SAID_TOOLS,
        "tool_choice": "required",
    }


TOKENS = [{"id": 1, "text": "<s>", "start": 0, "stop": 0}, {"id": 7, "text": "Gr\u00fc", "start": 0, "stop": 4}]


def test_the_tokens_of_a_prompt_are_told_with_their_places() -> None:
    expected = (PromptToken(1, "<s>", 0, 0), PromptToken(7, "Gr\u00fc", 0, 4))
    assert ENGINE.tokens(ask(), json.dumps(TOKENS).encode()) == expected
    answer = {"tokenize_response": TOKENS, "templated_text": "Gr\u00fc"}
    assert ENGINE.tokens(ask(chat=HELLO), json.dumps(answer).encode()) == expected
    assert ENGINE.tokens(ask(), b"[]") == ()


@pytest.mark.parametrize("answer", [b"", b"{}", b"[1]", b'[{"id":1}]', b'[{"id":"x"}]', b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("chat", [None, HELLO])
def test_an_answer_without_tokens_is_a_failed_server(answer: bytes, chat: Chat | None) -> None:
    with pytest.raises(UpstreamFailed, match="prompt's tokens"):
        ENGINE.tokens(ask(chat=chat), answer if chat or answer != b"{}" else b"7")


# ---- what is put through ----


def forwarded(body: bytes, path: str = "/v1/chat/completions") -> bytes:
    return ENGINE.forward(spec(), Call(path, body), "s").body


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b'{"model":"m","seed":18446744073709551615}', b'{"model":"tgi","seed":18446744073709551615}'),
        (b' {"a" : [1.10, {"model":"b"}],\n "model"\t: "m" , "z":1e400}', None),
        (b'{"mod\\u0065l":"m\\"x"}', b'{"mod\\u0065l":"tgi"}'),
        (b'{"model":"a","model":"b"}', b'{"model":"tgi","model":"tgi"}'),
        (
            '{"prompt":"\u00fc\U0001f600","model":"\u00fc"}'.encode(),
            '{"prompt":"\u00fc\U0001f600","model":"tgi"}'.encode(),
        ),
        (b'{"n":' + b"9" * 5000 + b',"model":"m"}', b'{"n":' + b"9" * 5000 + b',"model":"tgi"}'),
        (b'{"model":"m"} ', b'{"model":"tgi"} '),
        (b'{"x":"\xff","model":"m"}', b'{"x":"\xff","model":"tgi"}'),
        (b'{"model":"a","mod\\u0065l":"b","Model":"c"}', b'{"model":"tgi","mod\\u0065l":"tgi","Model":"c"}'),
    ],
)
def test_a_model_s_name_becomes_tgi_s_and_nothing_else_changes(body: bytes, sent: bytes | None) -> None:
    expected = sent or body.replace(b'"m" ,', b'"tgi" ,')
    assert forwarded(body) == forwarded(body, "/invocations") == forwarded(body, "/v1/completions?x=1") == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'["model"]',
        b'"model"',
        b'{"model":null}',
        b'{"model":7}',
        b'{"messages":[{"model":"m"}]}',
        b'{"model":"m"',
        b'{"model" "m"}',
        b'{"model":"m",}',
        b'{"model":"m" "x":1}',
        b"{model:1}",
        b"\xff\xfe",
        b'{"a":' + b"[" * 100_000,
        '{"model":"m"}'.encode("utf-16"),
    ],
)
def test_a_body_that_names_no_model_or_is_no_object_is_put_through_as_it_is(body: bytes) -> None:
    assert forwarded(body) == body


@settings(derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("model"), inner),
    ),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_any_json_means_the_same_but_for_its_model(value: Any, indent: int | None, ascii_only: bool) -> None:
    if isinstance(value, dict):
        value = {**value, "model": "m"}
    sent = json.loads(forwarded(json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode(errors="replace")))
    again = json.loads(json.dumps(value, ensure_ascii=ascii_only).encode(errors="replace"))
    assert sent == ({**again, "model": "tgi"} if isinstance(value, dict) else again)


def test_what_is_put_through_keeps_its_kind_and_no_other_header() -> None:
    theirs = {"authorization": "Bearer theirs", "content-type": "application/json; x=1", "cookie": "a", "Accept": "b"}
    call = Call("/generate", b'{"model":"m"}', theirs)
    assert ENGINE.forward(spec(), call, "s") == Call("/generate", call.body, {"content-type": "application/json; x=1"})
    assert ENGINE.forward(spec(api_key="sk-1"), call, "s").headers["Authorization"] == "Bearer sk-1"
    asked = Call("/v1/models", method="GET")
    assert ENGINE.forward(spec(), asked, "s") == asked
    assert ENGINE.speaks == "tgi"


# ---- what is heard ----

Events = list[TokenEvent | Finished]


def token(text: str, id: int = 5, logprob: float | None = -0.5, *, special: bool = False) -> dict[str, Any]:  # noqa: A002
    return {"id": id, "text": text, "logprob": logprob, "special": special}


def event(text: str, index: int = 1, *, end: str | None = None, special: bool = False, **more: Any) -> bytes:
    """Return one event as TGI sends it; with `end`, the last one."""
    details = {"finish_reason": end, "generated_tokens": index, "seed": None, "input_length": 9} if end else None
    whole = "the whole text" if end else None
    frame = {"index": index, "token": token(text, special=special), **more, "generated_text": whole, "details": details}
    return b"data: " + json.dumps(frame, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def decode(chunks: list[bytes], **asked: Any) -> Events:
    decoder = ENGINE.decoder(ask(**{"max_new_tokens": 100, **asked}))
    return [heard for chunk in chunks for heard in decoder.feed(chunk)]


def text_of(events: Events) -> str:
    *tokens, finished = events
    assert isinstance(finished, Finished)
    return collect([heard for heard in tokens if isinstance(heard, TokenEvent)], finished).text


WORDS = [" Paris", ".", "\n", "\n", "", "", "\U0001f600", " Gr\u00fc\u00df", " to"]
STREAM = b":\n\n" + b"".join(event(word, index) for index, word in enumerate(WORDS, 1))
TO_EOS = STREAM + event("</s>", 10, end="eos_token", special=True)
TO_LENGTH = STREAM + event("day", 10, end="length")


@pytest.mark.parametrize(
    ("stream", "text", "finished"),
    [
        (TO_EOS, "".join(WORDS), Finished("eos", 10, 9)),
        (TO_LENGTH, "".join(WORDS) + "day", Finished("length", 10, 9)),
        (STREAM + event("day", 10, end="stop_sequence"), "".join(WORDS) + "day", Finished("stop", 10, 9)),
        (TO_EOS.replace(b"data: ", b"data:"), "".join(WORDS), Finished("eos", 10, 9)),
        (TO_EOS.replace(b"\n\n", b"\r\n\r\n"), "".join(WORDS), Finished("eos", 10, 9)),
    ],
)
def test_an_answer_is_read_the_same_however_it_is_cut(stream: bytes, text: str, finished: Finished) -> None:
    whole = decode([stream])
    assert text_of(whole) == text
    assert whole[-1] == finished
    assert len(whole) == finished.tokens_generated + 1  # one event for each token, and the end
    assert decode([stream[i : i + 1] for i in range(len(stream))]) == whole


@settings(derandomize=True)
@given(
    cuts=st.lists(st.integers(0, len(TO_EOS)), max_size=20),
    stream=st.sampled_from([TO_EOS, TO_LENGTH, STREAM]),
    stop=st.sampled_from([(), ("\n\n",), ("ri",), ("Gr\u00fc\u00df t",), ("today!",)]),
)
def test_cuts_never_matter(cuts: list[int], stream: bytes, stop: tuple[str, ...]) -> None:
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[start:end] for start, end in pairwise(edges)]
    assert decode(chunks, stop=stop) == decode([stream], stop=stop)


@pytest.mark.parametrize(
    ("stop", "text", "finished"),
    [
        (("\n\n",), " Paris.", Finished("stop", 4, UNKNOWN_PROMPT_TOKENS, stop="\n\n")),
        (("ari",), " P", Finished("stop", 1, UNKNOWN_PROMPT_TOKENS, stop="ari")),
        (
            ("\u00fc\u00df to", "nowhere"),
            " Paris.\n\n\U0001f600 Gr",
            Finished("stop", 9, UNKNOWN_PROMPT_TOKENS, stop="\u00fc\u00df to"),
        ),
        (("today",), "".join(WORDS[:-1]) + " ", Finished("stop", 10, 9, stop="today")),  # complete in TGI's last event
        (("today!",), "".join(WORDS) + "day", Finished("length", 10, 9, "today")),
    ],
)
def test_a_stop_text_ends_the_answer_wherever_it_lies_and_is_cut_off(
    stop: tuple[str, ...], text: str, finished: Finished
) -> None:
    events = decode([TO_LENGTH], stop=stop)
    assert text_of(events) == text
    assert events[-1] == finished


def test_the_gateway_counts_and_ends_the_answer_though_tgi_goes_on() -> None:
    """TGI finishes the block of 1,024 tokens that it has begun."""
    events = decode([TO_LENGTH], max_new_tokens=3)
    assert text_of(events) == " Paris.\n"
    assert events[-1] == Finished("length", 3, UNKNOWN_PROMPT_TOKENS)


def test_text_that_was_held_back_is_not_lost_at_the_length() -> None:
    events = decode([TO_LENGTH], max_new_tokens=3, stop=("\n\n",))
    assert events[-1] == Finished("length", 3, UNKNOWN_PROMPT_TOKENS, "\n")


def test_a_special_token_has_no_text_and_is_counted() -> None:
    first, end = event("<pad>", 1, special=True), event("</s>", 2, end="eos_token", special=True)
    assert decode([first + end]) == [
        TokenEvent(5, "", -0.5, token="<pad>", special=True),
        TokenEvent(5, "", -0.5, token="</s>", special=True),
        Finished("eos", 2, 9),
    ]


def test_a_token_s_own_text_is_told_whatever_is_held_back() -> None:
    *events, finished = decode([TO_LENGTH], stop=("today!",))
    tokens = [heard for heard in events if isinstance(heard, TokenEvent)]
    assert "".join(heard.token or "" for heard in tokens) == "".join(WORDS) + "day"
    assert [heard.text for heard in tokens][-2:] == [" ", ""]
    assert finished == Finished("length", 10, 9, "today")


def test_without_a_length_the_answer_ends_where_tgi_ends_it() -> None:
    assert decode([TO_LENGTH], max_new_tokens=None)[-1] == Finished("length", 10, 9)


def test_the_likeliest_tokens_are_as_many_as_were_asked_for_at_most() -> None:
    """TGI sends more where some are equally likely, and fewer where some have no probability at all."""
    top = [token("a", 1, -0.5), token("b", 2, -1.5), token("c", 3, -1.5)]
    (heard,) = decode([event("a", top_tokens=top)], top_tokens=2)
    assert isinstance(heard, TokenEvent)
    assert [(chance.id, chance.text, chance.logprob) for chance in heard.top] == [(1, "a", -0.5), (2, "b", -1.5)]
    assert all(chance.probability == math.exp(chance.logprob) for chance in heard.top)
    (fewer,) = decode([event("a", top_tokens=[token("a", 1, 0.0), token("b", 2, None)])], top_tokens=5)
    assert isinstance(fewer, TokenEvent)
    assert [(chance.id, chance.probability) for chance in fewer.top] == [(1, 1.0)]


def test_a_logarithm_that_json_cannot_express_is_none() -> None:
    frame = {"index": 1, "token": token("a", 7, None), "generated_text": None, "details": None}
    assert decode([b"data:" + json.dumps(frame).encode() + b"\n\n"]) == [TokenEvent(7, "a", None, token="a")]


def test_nothing_is_said_after_the_end() -> None:
    decoder = ENGINE.decoder(ask())
    assert len(decoder.feed(event("a", 1, end="length") + event("b", 2) + b"data: nonsense\n")) == 2
    assert decoder.feed(event("c", 3)) == []


def test_an_answer_that_breaks_off_is_never_finished() -> None:
    assert not any(isinstance(heard, Finished) for heard in decode([STREAM]))


def failure(words: str, kind: str) -> bytes:
    return b"data: " + json.dumps({"error": words, "error_type": kind}).encode() + b"\n\n"


LENGTHS = "`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 2040 `inputs` tokens and 100 `max_new_tokens`"


@pytest.mark.parametrize(
    ("words", "kind", "error", "told"),
    [
        (
            "Input validation error: `inputs` must have less than 10 tokens. Given: 11",
            "validation",
            PromptTooLong,
            "11",
        ),
        ("Input validation error: `top_k` must be strictly positive", "validation", InvalidRequest, "`top_k` must be"),
        ("Model is overloaded", "overloaded", QueueFull, "Try again"),
        (
            "Request failed during generation: Server error: CUDA out of memory.\nsecond line",
            "generation",
            GenerationFailed,
            r"failed: Server error: CUDA out of memory\.$",
        ),
        ("Incomplete generation", "incomplete_generation_stream", GenerationFailed, "Incomplete generation"),
        ("something new", "new_type", GenerationFailed, "something new"),
        ("", "", GenerationFailed, "no reason given"),
    ],
)
def test_an_error_in_place_of_the_first_token_is_what_it_says(
    words: str, kind: str, error: type[GatewayError], told: str
) -> None:
    with pytest.raises(error, match=told) as raised:
        decode([failure(words, kind)])
    assert type(raised.value) is error


@pytest.mark.parametrize("kind", ["generation", "validation", "overloaded", "incomplete_generation_stream", "new"])
def test_an_error_in_mid_answer_is_a_failed_generation(kind: str) -> None:
    decoder = ENGINE.decoder(ask())
    decoder.feed(event("a"))
    with pytest.raises(GenerationFailed, match="in mid-answer: out of luck"):
        decoder.feed(failure("out of luck", kind))


@pytest.mark.parametrize(
    "line",
    [
        b"data: not json",
        b"data: [1]",
        b"data: [DONE]",
        b'data: {"index":1}',
        b'data: {"token":{"id":1}}',
        b'data: {"token":{"id":"x","text":"a","logprob":-1,"special":false}}',
        b'data: {"token":{"id":1,"text":7,"logprob":-1,"special":false}}',
        event("a", end="tired").strip(),
        event("a", end="length").strip().replace(b"input_length", b"other"),
        event("a", top_tokens=7).strip(),
        event("a", top_tokens=[7]).strip(),
        b'data: {"token":{"id":1,"text":"a","logprob":-1,"special":false},"generated_text":"x","details":null}',
        b"data: \xff\xfe",
        b"data: " + b"[" * 100_000,
    ],
)
def test_what_is_not_tgi_s_protocol_is_a_failed_generation(line: bytes) -> None:
    with pytest.raises(GenerationFailed, match="not its own protocol"):
        decode([line + b"\n\n"])


@settings(derandomize=True)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_our_own_errors(noise: bytes) -> None:
    with suppress(GatewayError):
        decode([noise, b"\ndata: " + noise + b"\n"])
    assert isinstance(ENGINE.refusal(500, noise), GatewayError)


# ---- what is heard of a chat ----

CHUNK_WORDS = st.sampled_from(
    ["choices", "delta", "content", "tool_calls", "function", "arguments", "name", "id", "finish_reason", "usage"]
)


def chunk(content: str | None, *, end: str | None = None, call: Any = None, report: Any = None) -> bytes:
    """Return one chunk of a chat as TGI sends it: a text, or a name and a piece of the arguments of a call."""
    delta: dict[str, Any] = {"role": "assistant", "content": content}
    if call:
        function = {"name": call[0], "arguments": call[1]}
        delta = {"role": "assistant", "tool_calls": [{"index": 0, "id": "0", "type": "function", "function": function}]}
    said = {"index": 0, "delta": delta, "logprobs": {"content": [report]} if report else None, "finish_reason": end}
    return frame_of(choices=[said], usage=None)


def frame_of(**frame: Any) -> bytes:
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "id": "", **frame}).encode() + b"\n\n"


def usage(completion_tokens: int, prompt_tokens: int = 9) -> bytes:
    return frame_of(choices=[], usage={"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens})


DONE = b"data: [DONE]\n\n"
HI = b":\n\n" + chunk("Hi") + chunk("") + chunk(" Gr\u00fc\u00df")


def decode_chat(chunks: list[bytes], **asked: Any) -> Events:
    return decode(chunks, **{"prompt": "", "chat": HELLO, **asked})


@pytest.mark.parametrize(
    ("stream", "asked", "text", "finished"),
    [
        (HI + chunk("", end="stop") + usage(4) + DONE, {}, "Hi Gr\u00fc\u00df", Finished("eos", 4, 9)),
        (HI + chunk("!", end="length") + usage(4) + DONE, {}, "Hi Gr\u00fc\u00df!", Finished("length", 4, 9)),
        (HI + chunk("!") + chunk("?"), {"max_new_tokens": 4}, "Hi Gr\u00fc\u00df!", Finished("length", 4, 0)),
        (HI + chunk("!"), {"stop": ("i Gr",), "count_prompt": True}, "H", Finished("stop", 3, 0, stop="i Gr")),
        (
            HI + chunk("", end="stop") + usage(4) + DONE,
            {"max_new_tokens": None},
            "Hi Gr\u00fc\u00df",
            Finished("eos", 4, 9),
        ),
        (
            HI + chunk("", end="stop") + usage(4) + DONE,
            {"stop": ("\u00df!",)},
            "Hi Gr\u00fc\u00df",
            Finished("eos", 4, 9, "\u00df"),
        ),
    ],
)
@pytest.mark.parametrize("chat", [HELLO, with_tools()])
def test_a_chat_is_read_the_same_however_it_is_cut(
    stream: bytes, asked: dict[str, Any], text: str, finished: Finished, chat: Chat
) -> None:
    whole = decode_chat([stream], chat=chat, **asked)
    assert text_of(whole) == text
    assert whole[-1] == finished
    assert decode_chat([stream[i : i + 1] for i in range(len(stream))], chat=chat, **asked) == whole


def test_a_chat_s_tokens_are_told_with_their_logprobs_and_their_kind() -> None:
    tops = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}]
    report = {"token": "a", "logprob": -0.5, "top_logprobs": tops}
    end = {"token": "</s>", "logprob": None, "top_logprobs": tops}
    stream = chunk("a", report=report) + chunk("", end="stop", report=end) + usage(2)
    first, second, finished = decode_chat([stream], top_tokens=2, logprobs=True)
    assert isinstance(first, TokenEvent)
    assert isinstance(second, TokenEvent)
    assert (first.text, first.token, first.logprob, first.special) == ("a", "a", -0.5, False)
    assert [(chance.text, chance.probability) for chance in first.top] == [("a", math.exp(-0.5)), ("b", math.exp(-1))]
    assert (second.text, second.token, second.logprob, second.special) == ("", "</s>", None, True)
    assert finished == Finished("eos", 2, 9)


def calls(*pieces: str, name: str = "weather") -> bytes:
    """Return the chunks of a call with these pieces of its arguments, after TGI's own first one."""
    return chunk(None, call=(name, "{")) + b"".join(chunk(None, call=(None, piece)) for piece in pieces)


@pytest.mark.parametrize(
    ("stream", "arguments", "reason"),
    [
        (calls(' "place', '":', ' "Rome', '"}') + usage(9), '{ "place": "Rome"}', "tool_calls"),
        (calls(",", '"place":"Rome"}', "") + usage(9), '{"place":"Rome"}', "tool_calls"),
        (calls(" ", ', "place":"a,,b"}') + usage(9), '{  "place":"a,,b"}', "tool_calls"),
        (calls("}", "") + usage(9), "{}", "tool_calls"),
        (calls() + usage(9), "{}", "tool_calls"),
        (calls() + chunk("", end="stop") + usage(9), "{}", "tool_calls"),
        (calls("}") + chunk("", end="stop") + usage(9), "{}", "tool_calls"),
        (calls('"pl') + chunk(None, call=(None, "ace"), end="length") + usage(9), '{"place', "length"),
        (chunk(None, call=("weather", "{"), end="length") + usage(9), "{", "length"),
        (calls('"place":"Ro') + usage(9), '{"place":"Ro', "length"),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_call_of_a_tool_is_whole_and_ends_with_a_reason(
    stream: bytes, arguments: str, reason: str, choice: str
) -> None:
    *events, finished = decode_chat([stream + DONE], chat=with_tools(choice))
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.tokens_generated, finished.prompt_tokens) == (reason, 9, 9)
    (called,) = collect([heard for heard in events if isinstance(heard, TokenEvent)], finished).tool_calls
    assert (called.name, called.arguments) == ("weather", arguments)
    assert called.id.startswith("call_")


@pytest.mark.parametrize(
    ("tokens", "most", "reason"), [(5, 5, "length"), (5, 6, "eos"), (5, None, "eos"), (0, 5, "eos")]
)
def test_a_call_that_never_began_was_cut_off_or_is_no_call(tokens: int, most: int | None, reason: str) -> None:
    *unseen, finished = decode_chat([usage(tokens) + DONE], chat=with_tools(), max_new_tokens=most)
    assert unseen == [TokenEvent(None, "")] * tokens
    assert finished == Finished(reason, tokens, 9)  # type: ignore[arg-type]


def chat_failure(words: str) -> bytes:
    return b"data: " + json.dumps({"error": {"message": words, "http_status_code": 422}}).encode() + b"\n\n" + DONE


CHAT_FAILURES: list[tuple[str, type[GatewayError], str]] = [
    ("Model is overloaded", QueueFull, "Try again"),
    (f"Input validation error: {LENGTHS}", PromptTooLong, "2040 tokens"),
    ("Input validation error: `top_p` must be > 0.0 and < 1.0", InvalidRequest, "`top_p` must be"),
    ("Input validation error: my private prompt", InvalidRequest, "its log"),
    ("Input validation error: grammar is not supported", Unsupported, "disable-grammar-support"),
    ("Input validation error: grammar is not valid: my private schema", InvalidRequest, "Make it simpler"),
    (
        "Input validation error: cannot compile regex from schema: Unsupported JSON Schema structure private",
        InvalidRequest,
        "Make it simpler",
    ),
    ("Request failed during generation: Server error: CUDA out of memory.", GenerationFailed, "CUDA out of memory"),
    ("Incomplete generation stream", GenerationFailed, "Incomplete generation"),
    ("Tool error: my private text", InvalidRequest, "tool_choice"),
    ("", GenerationFailed, "no reason given"),
]


@pytest.mark.parametrize(("words", "error", "told"), CHAT_FAILURES)
@pytest.mark.parametrize("chat", [HELLO, with_tools()])
def test_an_error_of_a_chat_is_known_by_its_words(words: str, error: type[GatewayError], told: str, chat: Chat) -> None:
    with pytest.raises(error, match=told) as raised:
        decode_chat([chat_failure(words)], chat=chat)
    assert type(raised.value) is error
    assert "private" not in raised.value.detail


@pytest.mark.parametrize("chat", [HELLO, with_tools()])
def test_an_error_in_the_midst_of_a_chat_is_a_failed_generation(chat: Chat) -> None:
    with pytest.raises(GenerationFailed, match="in mid-answer: Model is overloaded"):
        decode_chat([chunk("a") + chat_failure("Model is overloaded")], chat=chat)


@pytest.mark.parametrize(
    "line",
    [
        b"data: not json",
        b"data: [1]",
        DONE.strip(),
        b'data: {"index":1}',
        b'data: {"choices":7}',
        b'data: {"choices":[7]}',
        b'data: {"choices":[{"delta":{"tool_calls":[7]}}]}',
        b'data: {"choices":[{"delta":{"tool_calls":7}}]}',
        b"data: \xff",
        b"data: " + b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("chat", [HELLO, with_tools()])
def test_what_is_no_chunk_is_a_failed_generation(line: bytes, chat: Chat) -> None:
    with pytest.raises(GenerationFailed, match="not a chat completion"):
        decode_chat([line + b"\n\n"], chat=chat)


@settings(derandomize=True)
@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.sampled_from(["stop", "{"]),
        lambda inner: st.lists(inner) | st.dictionaries(CHUNK_WORDS, inner),
    )
)
def test_no_chunk_raises_anything_but_our_own_errors(frame: Any) -> None:
    noise = b"data: " + json.dumps(frame).encode() + b"\n\n"
    for chat in (HELLO, with_tools()):
        with suppress(GatewayError):
            decode_chat([noise, calls(), noise, usage(3)], chat=chat)


# ---- refusals ----


def body(words: str, kind: str) -> bytes:
    return json.dumps({"error": words, "error_type": kind}).encode()


@pytest.mark.parametrize(
    ("status", "answer", "kind", "words"),
    [
        (
            422,
            body("Input validation error: `inputs` must have less than 1024 tokens. Given: 3001", "validation"),
            PromptTooLong,
            "has 3001 tokens, and this model takes 1024 in a prompt.*context_tokens in models.yaml",
        ),
        (
            422,
            body(f"Input validation error: {LENGTHS}", "validation"),
            PromptTooLong,
            "has 2040 tokens, and with 100 new ones they are more than the 2048 .*lower max_new_tokens",
        ),
        (
            422,
            body("Input validation error: `top_n_tokens` must be >= 0 and <= 5. Given: 50", "validation"),
            InvalidRequest,
            r"refuses the request: `top_n_tokens` must be >= 0 and <= 5\. Given: 50\.$",
        ),
        (
            422,
            body("Input validation error: tokenizer error my private prompt", "validation"),
            InvalidRequest,
            "its log",
        ),
        (422, b"Failed to deserialize the JSON body: my private prompt", InvalidRequest, "cannot read the request"),
        (
            422,
            body("Template error: template not found", "template_error"),
            InvalidRequest,
            "no chat template. Send a prompt .*tokenizer-config-path",
        ),
        (
            422,
            body("Template error: syntax error: Only user roles (in <string>:1)\nprivate", "template_error"),
            InvalidRequest,
            "does not take this conversation: syntax error: Only user roles .*Change the roles",
        ),
        (422, body("Tool error: Tool with name private not found", "tool_error"), InvalidRequest, "in tool_choice"),
        (422, body("Input validation error: grammar is not supported", "validation"), Unsupported, "Leave out tools"),
        (429, body("Model is overloaded", "overloaded"), QueueFull, "Try again in a moment"),
        (429, b"", QueueFull, "Try again in a moment"),
        (424, body("Request failed during generation: boom", "generation"), GenerationFailed, r"failed: boom\.$"),
        (424, b"", GenerationFailed, "no reason given"),
        (500, body("Incomplete generation", "incomplete_generation"), GenerationFailed, "Incomplete generation"),
        (413, b"Failed to buffer the request body: length limit exceeded", BodyTooLarge, "payload-limit"),
        (503, body("unhealthy", "healthcheck"), UpstreamFailed, "status 503: unhealthy"),
        (401, b"", UpstreamFailed, "status 401.*`api_key`"),
        (400, b"Failed to parse the request body as JSON: my private prompt", UpstreamFailed, "status 400"),
        (404, b"<html>nginx</html>", UpstreamFailed, "status 404: no reason given"),
        (500, b"[]", UpstreamFailed, "status 500"),
        (500, b'{"error":{"message":"nested"}}', UpstreamFailed, "status 500: nested"),
        (500, b"\xff", UpstreamFailed, "status 500"),
        (500, b"[" * 100_000, UpstreamFailed, "status 500"),
    ],
)
def test_a_refusal_becomes_the_error_it_stands_for(
    status: int, answer: bytes, kind: type[GatewayError], words: str
) -> None:
    refusal = ENGINE.refusal(status, answer)
    assert type(refusal) is kind
    assert re.search(words, refusal.detail)
    assert "private" not in refusal.detail


def test_a_prompt_that_is_too_long_says_both_numbers_to_programs_too() -> None:
    refusal = ENGINE.refusal(422, body(f"Input validation error: {LENGTHS}", "validation"))
    assert refusal.extra == {"prompt_tokens": 2040, "context_tokens": 2048}


def test_an_overloaded_server_says_when_to_come_again() -> None:
    assert ENGINE.refusal(429, body("Model is overloaded", "overloaded")).retry_after_s == 1.0
