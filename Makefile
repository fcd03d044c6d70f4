.PHONY: video film serve test test-slow chaos soak fuzz lint types bench quality evaluate train clean
.DEFAULT_GOAL := video

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: two processes with two threads each on two cores slow each other down a hundredfold.
export OMP_NUM_THREADS ?= 1

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] < (3, 13) or sys.exit("Python 3.11 or 3.12 is needed; try: make video PYTHON=python3.12")'
	@echo "installing into $(VENV): about 2 GB, a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

video: $(VENV)/.installed  ## A video from the embedded model on two ranks, compared with the full sampler
	$(BIN)/lockstep generate "a red circle moving left on a black background" \
		--spectrum best-10 --ranks 2 --out out/video.mp4 --report out/video.json --compare --overwrite

film: $(VENV)/.installed  ## The example storyboard, two shots at a time, as one film
	$(BIN)/lockstep storyboard configs/storyboards/shapes.yaml --out out/film --replicas 2 --compare

serve: $(VENV)/.installed  ## Serve the HTTP API with wan-tiny, until Ctrl-C
	$(BIN)/lockstep serve --queue out/queue

test: $(VENV)/.installed  ## Four files at a time on two cores, as tests mostly wait
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed  ## All tests, including those that take minutes
	$(BIN)/python -m pytest -m 'slow or not slow'

chaos: $(VENV)/.installed  ## 300 random faults, two at a time; two hours. Resumes where it was stopped
	$(BIN)/python scripts/chaos.py --runs 300 --jobs 2 --log docs/reliability.jsonl --out docs/reliability.md

soak: $(VENV)/.installed  ## 300 jobs for a server that is killed at random. Resumes where it was stopped
	$(BIN)/python scripts/soak_serve.py --jobs 300 --clients 8 --folder out/soak --out out/soak.md

fuzz: $(VENV)/.installed  ## Damaged and hostile input of every kind, for five minutes
	$(BIN)/python scripts/fuzz.py --seconds 300 --seed $(or $(SEED),0)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

bench: $(VENV)/.installed  ## Cost of a forecast against the reference's formula, and scaling over ranks
	$(BIN)/python scripts/bench_forecast.py --out docs/forecast.md
	$(BIN)/python scripts/bench_scaling.py --out docs/scaling.md

evaluate: $(VENV)/.installed  ## Accuracy of wan-tiny: colour, background and motion of 48 videos
	$(BIN)/python scripts/evaluate_wan_tiny.py

quality: $(VENV)/.installed  ## Quality at equal evaluations, against other methods; hours on two cores
	$(BIN)/python scripts/bench_quality.py --out docs/quality.md

train: $(VENV)/.installed  ## wan-tiny from scratch, 80 minutes on two cores; resumes where it was stopped
	env -u OMP_NUM_THREADS MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_TOP_PAD_=100000000 \
		$(BIN)/python scripts/train_wan_tiny.py --out runtime/models/wan-tiny --compile

clean:
	rm -rf out
