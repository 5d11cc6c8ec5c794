"""Evaluation: samples, answers, scores. Models and transports are handed in as an Answerer."""
