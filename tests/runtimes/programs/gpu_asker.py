"""Asks NVML as the gateway does. Prints the GPUs, then for each line of ids that it reads what is free of those."""

import asyncio
import json
import logging
import sys
from dataclasses import asdict

from gateway.runtimes.nvml import Nvml


def say(told: object) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


async def main(answer_s: float) -> None:
    nvml = Nvml(first_answer_s=answer_s, answer_s=answer_s)
    say({"devices": [asdict(each) for each in nvml.devices() or ()], "silence": nvml.silence})
    for line in sys.stdin:
        # all at once, as models that start together ask
        answers = await asyncio.gather(*(nvml.memory(ids.split(",")) for ids in line.split()))
        say([{gpu: asdict(memory) for gpu, memory in answer.items()} for answer in answers])
    await nvml.aclose()
    say(await nvml.memory(["0"]))


logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
asyncio.run(main(float(sys.argv[1])))
