"""Speech by espeak-ng, as the agent of a conversation speaks it.

As a program, `voice.py TEXT FILE` writes a WAV file.
"""

import functools
import re
import subprocess
import sys
import wave

import numpy as np

from livekit import rtc

RATE = 24_000
FRAME = RATE // 50
# The RMS of the speech, in dBFS.
LEVEL = -22.0
# The silence between two sentences, in seconds.
SENTENCE_PAUSE = 0.4
# Speech begins and ends with the first and the last sample above this share of its peak. espeak-ng adds silence around it.
EDGE = 0.02


@functools.cache
def sentence(text: str) -> np.ndarray:
    """The samples of one sentence with full scale 1.0 and the RMS of LEVEL, without silence around it."""
    command = ["espeak-ng", "-v", "en-us", "-s", "165", "--stdout", text]
    spoken = subprocess.run(command, check=True, capture_output=True).stdout
    # The length in the header is a maximum, because espeak-ng writes to a pipe.
    start = spoken.index(b"data") + 8
    recorded = int.from_bytes(spoken[24:28], "little")
    signal = np.frombuffer(spoken[start : len(spoken) // 2 * 2], dtype=np.int16) / 32768
    times = np.arange(len(signal) * RATE // recorded) * recorded / RATE
    signal = np.interp(times, np.arange(len(signal)), signal)
    loud = np.flatnonzero(np.abs(signal) > EDGE * np.max(np.abs(signal)))
    signal = signal[loud[0] : loud[-1] + 1]
    scaled = signal * 10 ** (LEVEL / 20) / np.sqrt(np.mean(signal**2))
    return np.clip(scaled, -1, 1)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE))


def speech(text: str) -> np.ndarray:
    """The samples of all sentences of a text, with a pause between them."""
    sentences = [part for part in re.split(r"(?<=[.?!])\s+", text.strip()) if part]
    parts = [sentence(sentences[0])]
    for later in sentences[1:]:
        parts += [silence(SENTENCE_PAUSE), sentence(later)]
    return np.concatenate(parts)


def noise(seconds: float, level: float) -> np.ndarray:
    """White noise with an RMS of `level` dBFS."""
    return np.random.default_rng(1).normal(0, 10 ** (level / 20), int(seconds * RATE))


def pcm(signal: np.ndarray, gain: float = 0.0) -> bytes:
    """16-bit samples, `gain` dB louder."""
    scaled = np.clip(signal * 10 ** (gain / 20), -1, 1)
    return (scaled * 32767).astype(np.int16).tobytes()


def frames(signal: np.ndarray, gain: float = 0.0):
    """Frames of 20 ms. The last one is filled with silence."""
    signal = np.concatenate([signal, np.zeros(-len(signal) % FRAME)])
    for start in range(0, len(signal), FRAME):
        yield rtc.AudioFrame(pcm(signal[start : start + FRAME], gain), RATE, 1, FRAME)


def loud_pieces(signal: np.ndarray, rate: int, milliseconds: int, share: float) -> np.ndarray:
    """The numbers of the pieces of this length that are louder than this share of the loudest one."""
    size = rate * milliseconds // 1000
    pieces = signal[: len(signal) // size * size].reshape(-1, size)
    levels = np.sqrt(np.mean(pieces**2, axis=1))
    return np.flatnonzero(levels > share * np.max(levels, initial=0))


def voiced_seconds(signal: np.ndarray, rate: int) -> float:
    """How much of the signal is speech."""
    return len(loud_pieces(signal, rate, 20, share=0.1)) * 0.02


def edges(signal: np.ndarray, rate: int) -> tuple[float, float]:
    """Where the speech in a signal begins and ends, in seconds from its start."""
    loud = loud_pieces(signal, rate, 10, share=EDGE)
    return (float(loud[0]) * 0.01, float(loud[-1] + 1) * 0.01) if len(loud) else (0.0, 0.0)


if __name__ == "__main__":
    with wave.open(sys.argv[2], "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(pcm(speech(sys.argv[1])))
