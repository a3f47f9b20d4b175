"""OpenVINO GenAI's continuous batching under a load, in one process; runs in its environment.

    python openvino_driver.py MODEL_FOLDER THREADS STEP_TOKENS SEQUENCES

A line of JSON in is a load, `{"requests": [{"at_s", "prompt", "output_tokens"}]}`, or a text to
judge, `{"windows": [[ids]]}`; the line out is a sample a request, or the mean negative
log-likelihood. There is no HTTP between: what a server would cost is not in its figures.
"""

import json
import os
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai


def pipeline(folder, threads, step_tokens, sequences):
    config = genai.SchedulerConfig()
    config.max_num_batched_tokens = step_tokens
    config.max_num_seqs = sequences
    config.cache_size = 2
    config.dynamic_split_fuse = True
    config.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    return genai.ContinuousBatchingPipeline(folder, config, "CPU", properties)


def generation(output_tokens):
    config = genai.GenerationConfig()
    config.max_new_tokens = output_tokens
    config.min_new_tokens = output_tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


def run(pipe, requests):
    waiting = sorted(range(len(requests)), key=lambda i: requests[i]["at_s"])
    found = [{"piece_s": [], "output_tokens": 0} for _ in requests]
    open_ = {}
    start = time.perf_counter()
    while waiting or open_:
        now = time.perf_counter() - start
        while waiting and requests[waiting[0]]["at_s"] <= now:
            i = waiting.pop(0)
            ids = np.array([requests[i]["prompt"]], dtype=np.int64)
            config = generation(requests[i]["output_tokens"])
            # A step that was running when it came is part of its wait.
            found[i]["sent_s"] = requests[i]["at_s"]
            open_[i] = pipe.add_request(i, ov.Tensor(ids), config)
        if not open_:
            time.sleep(max(0.0, requests[waiting[0]]["at_s"] - (time.perf_counter() - start)))
            continue
        pipe.step()
        now = time.perf_counter() - start
        for i, handle in list(open_.items()):
            if handle.can_read():
                drawn = sum(len(each.generated_ids) for each in handle.read().values())
                found[i]["output_tokens"] += drawn
                found[i]["piece_s"].append(now)
            if handle.get_status() != genai.GenerationStatus.RUNNING and not handle.can_read():
                found[i]["end_s"] = now
                if handle.get_status() != genai.GenerationStatus.FINISHED:
                    found[i]["error"] = str(handle.get_status())
                del open_[i]
    return found


def mean_nll(folder, threads, windows):
    import torch
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(folder, ov_config={"INFERENCE_NUM_THREADS": threads})
    total, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        likelihood = torch.log_softmax(logits.float(), dim=-1)
        total -= float(likelihood.gather(1, ids[0, 1:, None]).double().sum())
        count += ids.shape[1] - 1
    return total / count


def main():
    folder = sys.argv[1]
    threads, step_tokens, sequences = map(int, sys.argv[2:5])
    # What libraries print goes to the log, not between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    pipe = pipeline(folder, threads, step_tokens, sequences)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "windows" in job:
            answer = mean_nll(folder, threads, job["windows"])
        else:
            answer = run(pipe, job["requests"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
