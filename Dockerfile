# What a CUDA machine needs beside its driver. Not built where it was written; docs/rented_gpus.md has how to run it.
FROM python:3.12-slim

# Triton compiles its launchers with a C compiler and Python's headers, which this Python brings; torch brings CUDA.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /recipes
COPY pyproject.toml requirements.txt README.md LICENSE finetune.py ./
COPY recipes recipes
COPY configs configs
RUN pip install --no-cache-dir -r requirements.txt
COPY examples examples

# For any --user, who has no home here: models, prepared rows and compiled launchers go to the folder that is mounted.
ENV HOME=/cache HF_HOME=/cache/huggingface USER=trainer PYTHONUNBUFFERED=1
RUN mkdir -m 777 /cache /work

# As process 1, Python itself has the signals of `docker stop`: a run ends with a whole checkpoint.
WORKDIR /work
ENTRYPOINT ["/bin/sh", "-c", "script=$1; shift; exec python /recipes/recipes/$script \"$@\"", "recipe"]
CMD ["plan_run.py"]
