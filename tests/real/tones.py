"""The tones that the agent and the caller of the scenarios play, and how each recognises the other."""

import zlib

import numpy as np

from livekit import rtc

FRAME_MS = 20
# A frame with a lower RMS is silence. Full scale is 1.0, and the tone has 0.35.
AUDIBLE = 0.01
# The share of a frame's energy that must be at a frequency, so that the frame is that tone.
PURITY = 0.5


def tone_of(room: str) -> int:
    """The frequency of the room in Hz. It differs between rooms, so that the echo of another room is not counted."""
    return 400 + 50 * (zlib.crc32(room.encode()) % 20)


def tone(frequency: int, seconds: float, rate: int):
    """A tone in frames of 20 ms."""
    samples = rate * FRAME_MS // 1000
    for start in range(0, int(rate * seconds), samples):
        phase = np.arange(start, start + samples) * (2 * np.pi * frequency / rate)
        pcm = (np.sin(phase) * 0.5 * 32767).astype(np.int16)
        yield rtc.AudioFrame(pcm.tobytes(), rate, 1, samples)


def signal_of(frame: rtc.AudioFrame) -> np.ndarray:
    """Samples with full scale 1.0."""
    return np.frombuffer(frame.data, dtype=np.int16).astype(np.float64) / 32768


def is_audible(signal: np.ndarray) -> bool:
    return float(np.dot(signal, signal)) / len(signal) >= AUDIBLE**2


def silence_after(signal: np.ndarray, rate: int) -> float:
    """The seconds from the last audible sample to the end."""
    audible = np.flatnonzero(np.abs(signal) >= AUDIBLE)
    last = audible[-1] if len(audible) else -1
    return (len(signal) - 1 - last) / rate


def is_tone(signal: np.ndarray, frequency: int, rate: int) -> bool:
    """Whether most of the frame's energy is at `frequency`: the Goertzel algorithm as a dot product."""
    if not is_audible(signal):
        return False
    turns = np.exp(-2j * np.pi * frequency * np.arange(len(signal)) / rate)
    at_frequency = 2 * abs(np.dot(signal, turns)) ** 2 / len(signal)
    return at_frequency / float(np.dot(signal, signal)) > PURITY
