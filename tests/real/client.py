"""A caller with LiveKit's Python client library, which shares no code with the canary. It joins a room, waits for the
agent's greeting, responds with the tone of the room, and waits for the agent's reply.

It prints one JSON object per line with `event` (`greeting`, `said`, `reply`) and `seconds`, and exits with status 0
after the reply. LIVEKIT_URL, LIVEKIT_TOKEN and ROOM select the room.
"""

import asyncio
import json
import os

import numpy as np

from livekit import rtc

from tones import FRAME_MS, is_audible, marked_speech, signal_of, tone_of

SPEECH_RATE = 48_000
LISTEN_RATE = 16_000
SPEECH_SECONDS = 2
# An utterance begins after this many consecutive audible frames, and ends after this many silent ones.
BEGIN_FRAMES = 5
END_FRAMES = 30
# The timeouts for the greeting and for the reply.
PATIENCE = 40


def tell(event: str, seconds: float) -> None:
    print(json.dumps({"event": event, "seconds": seconds}), flush=True)


async def listen(track: rtc.Track, heard: asyncio.Queue) -> None:
    """Puts the length of every utterance in `track` into `heard` after its end, in seconds."""
    audible = 0
    silent = 0
    stream = rtc.AudioStream(track, sample_rate=LISTEN_RATE, num_channels=1, frame_size_ms=FRAME_MS)
    async for event in stream:
        if is_audible(signal_of(event.frame)):
            audible += 1
            silent = 0
            continue
        silent += 1
        if audible < BEGIN_FRAMES:
            audible = 0
        elif silent == END_FRAMES:
            heard.put_nowait(audible * FRAME_MS / 1000)
            audible = 0


async def speak(source: rtc.AudioSource, speech: asyncio.Queue) -> None:
    """A microphone that is always on: it sends the frames in `speech`, and otherwise silence."""
    samples = SPEECH_RATE * FRAME_MS // 1000
    silence = rtc.AudioFrame(np.zeros(samples, np.int16).tobytes(), SPEECH_RATE, 1, samples)
    while True:
        await source.capture_frame(silence if speech.empty() else speech.get_nowait())


async def call() -> None:
    heard = asyncio.Queue()
    speech = asyncio.Queue()
    tasks = []
    room = rtc.Room()

    @room.on("track_subscribed")
    def _(track, _publication, participant) -> None:
        if participant.kind == rtc.ParticipantKind.PARTICIPANT_KIND_AGENT:
            tasks.append(asyncio.create_task(listen(track, heard)))

    await room.connect(os.environ["LIVEKIT_URL"], os.environ["LIVEKIT_TOKEN"])
    source = rtc.AudioSource(SPEECH_RATE, 1, queue_size_ms=100)
    tasks.append(asyncio.create_task(speak(source, speech)))
    track = rtc.LocalAudioTrack.create_audio_track("microphone", source)
    options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
    await room.local_participant.publish_track(track, options)

    tell("greeting", await asyncio.wait_for(heard.get(), PATIENCE))
    for frame in marked_speech(tone_of(os.environ["ROOM"]), SPEECH_SECONDS, SPEECH_RATE):
        speech.put_nowait(frame)
    tell("said", SPEECH_SECONDS)
    tell("reply", await asyncio.wait_for(heard.get(), PATIENCE))
    for task in tasks:
        task.cancel()
    await room.disconnect()


if __name__ == "__main__":
    asyncio.run(call())
    # The interpreter does not shut down normally: if a thread of the library calls back during that, SIGABRT ends the process.
    os._exit(0)
