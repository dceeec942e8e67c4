"""Convert the model to ONNX, fp32, for Infinity's engine "optimum": export.py MODEL DIRECTORY."""

import sys

from optimum.onnxruntime import ORTModelForFeatureExtraction
from transformers import AutoTokenizer

source, target = sys.argv[1:]
ORTModelForFeatureExtraction.from_pretrained(source, export=True).save_pretrained(target)
AutoTokenizer.from_pretrained(source).save_pretrained(target)
