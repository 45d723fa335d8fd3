# The tests' voice agent, for the profile `livekit` of compose.yml. It plays tones, so it needs no API key for a model.
FROM python:3.11-slim-bookworm
RUN useradd --system --create-home agent
WORKDIR /agent
COPY requirements.txt ./
RUN pip install --no-cache-dir --no-deps -r requirements.txt
COPY *.py ./
USER agent
ENV REPORT=/tmp/report.jsonl
CMD ["python", "agent.py"]
