"""Convert the model to ONNX, fp32, for Infinity's engine "optimum": export.py MODEL DIRECTORY.

optimum 1.24 knows torch's first exporter; the torch of these pins would take its second.
"""

import functools
import sys

import torch

torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)

from optimum.onnxruntime import ORTModelForFeatureExtraction  # noqa: E402 - after the line above
from transformers import AutoTokenizer  # noqa: E402 - as above

source, target = sys.argv[1:]
ORTModelForFeatureExtraction.from_pretrained(source, export=True).save_pretrained(target)
AutoTokenizer.from_pretrained(source).save_pretrained(target)
