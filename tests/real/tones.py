"""The speech that the agent and the caller of the scenarios play, and how each recognises the other: by a tone in it.

The canary needs real speech: a voice activity detector decides what it hears.
"""

import pathlib
import wave
import zlib

import numpy as np

from livekit import rtc

FRAME_MS = 20
# A frame with a lower RMS is silence. Full scale is 1.0, and the speech has 0.12.
AUDIBLE = 0.01
# The share of a frame's energy that must be at a frequency, so that the frame has that tone. It is above 0.4 in frames of
# `marked_speech`, and below 0.2 at the frequencies of other rooms.
PURITY = 0.3
# The level of the tone over that of the speech. The tone follows the level of the speech, so that it has its rhythm.
TONE_LEVEL = 1.5
# Half a second that begins and ends within a vowel, spoken by espeak-ng.
SPEECH = pathlib.Path(__file__).with_name("speech.wav")


def tone_of(room: str) -> int:
    """The frequency of the room in Hz. It differs between rooms, so that the echo of another room is not counted."""
    return 400 + 50 * (zlib.crc32(room.encode()) % 20)


def clip(rate: int) -> np.ndarray:
    """The samples of SPEECH at this rate, with full scale 1.0."""
    with wave.open(str(SPEECH)) as file:
        recorded = file.getframerate()
        signal = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32768
    times = np.arange(len(signal) * rate // recorded) * recorded / rate
    return np.interp(times, np.arange(len(signal)), signal)


def marked_speech(frequency: int, seconds: float, rate: int):
    """Speech with a tone in it, in frames of 20 ms. It begins and ends without silence."""
    samples = rate * FRAME_MS // 1000
    speech = clip(rate)
    # The level of the speech around each sample. The clip repeats without a gap.
    power = np.convolve(np.tile(speech, 3) ** 2, np.ones(samples) / samples, "same")
    level = np.sqrt(power[len(speech) : 2 * len(speech)])
    for start in range(0, int(rate * seconds), samples):
        index = np.arange(start, start + samples)
        tone = np.sin(index * (2 * np.pi * frequency / rate)) * np.sqrt(2) * TONE_LEVEL
        place = index % len(speech)
        pcm = ((speech[place] + tone * level[place]) * 32767).astype(np.int16)
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
