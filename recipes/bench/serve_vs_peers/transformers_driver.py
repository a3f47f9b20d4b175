"""transformers' `generate` on a static batch, in one process; runs in its environment.

    python transformers_driver.py MODEL_FOLDER THREADS

A line of JSON in is a load whose requests come all at once and are of one shape; the line out is
a sample a request. It has no continuous batching, so it takes no other load.
"""

import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM, StoppingCriteriaList


@torch.inference_mode()
def run(model, requests):
    ids = torch.tensor([each["prompt"] for each in requests])
    tokens = requests[0]["output_tokens"]
    piece_s = []

    # A streamer takes one sequence only; a criterion sees every step of a whole batch.
    def seen(ids, scores, **_):
        piece_s.append(time.perf_counter() - start)
        return torch.zeros(len(ids), dtype=torch.bool)

    start = time.perf_counter()
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([seen]),
    )
    end_s = time.perf_counter() - start
    drawn = made.shape[1] - ids.shape[1]
    return [
        {"sent_s": 0.0, "end_s": end_s, "piece_s": piece_s, "output_tokens": drawn}
        for _ in requests
    ]


def main():
    # What libraries print goes to the log, not between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[2]))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(model, json.loads(line)["requests"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
