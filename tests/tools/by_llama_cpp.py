"""What llama.cpp makes of a GGUF file, in a process of its own: python by_llama_cpp.py FILE.gguf TEXT

The last line is JSON: how many tokens the text has, and of each token of the vocabulary the logarithm of its
probability to come next. llama.cpp ends the process where it meets what it does not expect.
"""

import json
import sys

import xllamacpp

path, text = sys.argv[1:3]
how = xllamacpp.CommonParams()
how.model.path = path
how.n_ctx = 64
how.n_parallel = 1
how.n_gpu_layers = 0
how.cpuparams.n_threads = 1
how.warmup = False
server = xllamacpp.Server(how)
said = server.handle_completions({"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 100_000})
(next_one,) = said["choices"][0]["logprobs"]["content"]
of_each = {one["id"]: one["logprob"] for one in next_one["top_logprobs"]}
print(json.dumps({"tokens": said["usage"]["prompt_tokens"], "logprobs": [of_each[i] for i in range(len(of_each))]}))
