"""The voice agent that the scenarios deploy: a livekit-agents worker that needs no key of any model.

What a job does is chosen by its dispatch metadata, a JSON object with `behaviour` (a key of BEHAVIOURS, default
`greet`) and that behaviour's own settings. What a job saw goes to the file REPORT, one JSON object a line, each with
`room`, `event` and `at` (Unix seconds). The worker itself is set up by the environment:

  LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET   the server
  AGENT_NAME      the name to register under; empty: unnamed, and LiveKit sends it to every new room
  AGENT_LOAD      the load that it claims, 0 to 1 (a server passes over a worker above 0.7)
  REPORT          path of the report
"""

import asyncio
import json
import logging
import os
import time

from livekit import api, rtc
from livekit.agents import (
    Agent,
    AgentServer,
    AgentSession,
    AgentStateChangedEvent,
    BackgroundAudioPlayer,
    JobContext,
)

from models import Llm, Stt, Tts
from tones import FRAME_MS, is_audible, is_tone, signal_of, silence_after, tone, tone_of

SPEECH_RATE = 24_000
LISTEN_RATE = 16_000
# Of the background sound, in Hz: above every room's own tone.
BACKGROUND = 2_500
BACKGROUND_RATE = 48_000
# So many tone frames in a row begin an echo, so much silence ends it.
BEGIN_FRAMES = 5
END_SECONDS = 0.4


def report(room: str, event: str, **details: object) -> None:
    """Appends one line to the report; O_APPEND keeps the lines of several processes whole."""
    line = json.dumps({"room": room, "event": event, "at": time.time(), **details}) + "\n"
    fd = os.open(os.environ["REPORT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


async def speech(frequency: int, seconds: float):
    """A tone as fast as it is taken."""
    for frame in tone(frequency, seconds, SPEECH_RATE):
        yield frame


async def hear_echoes(room: str, track: rtc.Track, heard: asyncio.Queue) -> None:
    """Reports every stretch of the room's own tone in `track` once it has ended."""
    frequency = tone_of(room)
    began = None
    frames = 0
    last = 0.0
    pure = False
    stream = rtc.AudioStream(track, sample_rate=LISTEN_RATE, num_channels=1, frame_size_ms=FRAME_MS)
    async for event in stream:
        now = time.time()
        signal = signal_of(event.frame)
        before, pure = pure, is_tone(signal, frequency, LISTEN_RATE)
        # A tone may end in a frame of which it is too small a part.
        if pure or before and is_audible(signal):
            last = now - silence_after(signal, LISTEN_RATE)
        if pure:
            frames += 1
            if frames == BEGIN_FRAMES:
                began = now - BEGIN_FRAMES * FRAME_MS / 1000
        elif now - last > END_SECONDS:
            if began is not None:
                seconds = frames * FRAME_MS / 1000
                report(room, "heard", began=began, ended=last, seconds=seconds)
                heard.put_nowait(seconds)
            began = None
            frames = 0


class Job:
    """One job: its room, its order, and the echoes that it hears."""

    def __init__(self, ctx: JobContext, order: dict):
        self.ctx = ctx
        self.order = order
        self.room = ctx.job.room.name
        self.heard = asyncio.Queue()
        self.listening = []
        self.speaks_since = None

    async def connect(self) -> None:
        await asyncio.sleep(self.order.get("connect_after", 0))
        self.ctx.room.on("track_subscribed", self.subscribed)
        report(self.room, "connecting")
        await self.ctx.connect()
        report(self.room, "connected", identity=self.ctx.room.local_participant.identity)

    def subscribed(self, track, publication, participant) -> None:
        # An agent listens to no other source, and not to who speaks for it.
        own = "lk.publish_on_behalf" in participant.attributes
        if publication.source == rtc.TrackSource.SOURCE_MICROPHONE and not own:
            caller, attributes = participant.identity, dict(participant.attributes)
            report(self.room, "caller", caller=caller, attributes=attributes)
            self.listening.append(
                asyncio.create_task(hear_echoes(self.room, track, self.heard))
            )

    async def session(self, **models) -> AgentSession:
        # vad=None: the bundled one costs CPU, and nothing here takes turns by it.
        session = AgentSession(vad=None, **models)
        session.on("agent_state_changed", self.state_changed)
        await session.start(agent=Agent(instructions=""), room=self.ctx.room, record=False)
        return session

    def state_changed(self, event: AgentStateChangedEvent) -> None:
        # From the request to the first frame it is the framework that takes its time, and a caller waits for it too.
        if event.new_state == "speaking":
            self.speaks_since = event.created_at

    async def say(self, session: AgentSession, event: str) -> None:
        seconds = self.order.get("seconds", 2)
        handle = session.say("(tone)", audio=speech(tone_of(self.room), seconds))
        await handle.wait_for_playout()
        report(self.room, event, began=self.speaks_since, ended=time.time())

    async def publish(self, queue_ms: int, room: rtc.Room | None = None) -> rtc.LocalTrackPublication:
        """Publishes a voice that is given nothing to say: with a queue it sends silence, without one nothing at all."""
        self.source = rtc.AudioSource(SPEECH_RATE, 1, queue_size_ms=queue_ms)
        track = rtc.LocalAudioTrack.create_audio_track("voice", self.source)
        # With DTX hardly any packet of silence would be sent.
        options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE, dtx=False)
        speaker = (room or self.ctx.room).local_participant
        return await speaker.publish_track(track, options)

    async def utter(self) -> None:
        """Says the order's `seconds` on the published voice, without asking whether anybody listens."""
        began = time.time()
        for frame in tone(tone_of(self.room), self.order.get("seconds", 2), SPEECH_RATE):
            await self.source.capture_frame(frame)
        await self.source.wait_for_playout()
        report(self.room, "greeted", began=began, ended=time.time())

    async def play_background(self) -> None:
        """Sound without an end on a track of its own, by the SDK's own player."""

        async def endless():
            while True:
                for frame in tone(BACKGROUND, 1, BACKGROUND_RATE):
                    yield frame

        self.background = BackgroundAudioPlayer(ambient_sound=endless())
        await self.background.start(room=self.ctx.room)


async def greet(job: Job) -> None:
    """Speaks first, as every agent does that a canary can watch; listens for the rest of the call."""
    await job.connect()
    await job.say(await job.session(), "greeted")


async def reply(job: Job) -> None:
    """Greets, and answers the first echo once."""
    await job.connect()
    session = await job.session()
    await job.say(session, "greeted")
    await job.heard.get()
    await job.say(session, "replied")


async def leave(job: Job) -> None:
    """Greets and hangs up `after` seconds later."""
    await job.connect()
    await job.say(await job.session(), "greeted")
    await asyncio.sleep(job.order.get("after", 0))
    job.ctx.shutdown("hangs up")


async def converse(job: Job) -> None:
    """Greets and answers by models, of which the one that `failing` names raises `error` instead."""
    await job.connect()
    error_of = {job.order.get("failing"): job.order.get("error")}
    tone_here, seconds = tone_of(job.room), job.order.get("seconds", 2)
    session = await job.session(
        llm=Llm("Good day to you.", error_of.get("llm")),
        tts=Tts(tone_here, seconds, error_of.get("tts")),
        stt=Stt(tone_here, "hello there", error_of.get("stt")),
        turn_detection="stt",
    )
    session.generate_reply(instructions="Greet.")


async def nothing(job: Job) -> None:
    """Ends its job at once."""


async def never_connect(job: Job) -> None:
    await asyncio.Event().wait()


async def fail(job: Job) -> None:
    """Breaks in its entrypoint, as on a missing key or a bad import."""
    raise RuntimeError("this agent fails before it connects")


async def blurt(job: Job) -> None:
    """Speaks as soon as its track is published: an agent without a session waits for nobody."""
    await job.connect()
    await job.publish(queue_ms=1000)
    await job.utter()


async def reply_and_leave(job: Job) -> None:
    await reply(job)
    job.ctx.shutdown("hangs up")


async def greet_over_background(job: Job) -> None:
    await job.connect()
    session = await job.session()
    await job.play_background()
    await job.say(session, "greeted")


async def background_alone(job: Job) -> None:
    """Its voice is silent all along."""
    await job.connect()
    await job.publish(queue_ms=1000)
    await job.play_background()


async def speak_by_avatar(job: Job) -> None:
    """Lets a second participant publish on its behalf, as avatar workers do; itself it publishes nothing."""
    await job.connect()
    token = (
        api.AccessToken()
        .with_identity(f"avatar-{job.room}")
        .with_kind("agent")
        .with_grants(api.VideoGrants(room_join=True, room=job.room))
        .with_attributes({"lk.publish_on_behalf": job.ctx.room.local_participant.identity})
    )
    job.avatar = rtc.Room()
    await job.avatar.connect(os.environ["LIVEKIT_URL"], token.to_jwt())
    publication = await job.publish(queue_ms=1000, room=job.avatar)
    await publication.wait_for_subscription()
    await job.utter()


async def restart_track(job: Job) -> None:
    """Greets, and answers the first echo on a track that takes the first one's place."""
    await job.connect()
    publication = await job.publish(queue_ms=1000)
    await publication.wait_for_subscription()
    await job.utter()
    await job.heard.get()
    await job.ctx.room.local_participant.unpublish_track(publication.sid)
    publication = await job.publish(queue_ms=1000)
    await publication.wait_for_subscription()
    await job.utter()


async def no_track(job: Job) -> None:
    await job.connect()


async def no_packets(job: Job) -> None:
    await job.connect()
    await job.publish(queue_ms=0)


async def silence(job: Job) -> None:
    await job.connect()
    await job.publish(queue_ms=1000)


BEHAVIOURS = {
    behaviour.__name__: behaviour
    for behaviour in (
        greet,
        reply,
        leave,
        converse,
        nothing,
        never_connect,
        fail,
        blurt,
        reply_and_leave,
        greet_over_background,
        background_alone,
        speak_by_avatar,
        restart_track,
        no_track,
        no_packets,
        silence,
    )
}


async def entrypoint(ctx: JobContext) -> None:
    metadata = ctx.job.metadata
    report(ctx.job.room.name, "job", pid=os.getpid(), metadata=metadata)
    order = json.loads(metadata) if metadata else {}
    await BEHAVIOURS[order.get("behaviour", "greet")](Job(ctx, order))


def claimed_load(*_) -> float:
    return float(os.environ.get("AGENT_LOAD", "0"))


async def main() -> None:
    server = AgentServer(
        num_idle_processes=1,
        # A cold interpreter takes seconds on a loaded machine; the default of 10 s gives up on it.
        initialize_process_timeout=60,
        load_fnc=claimed_load,
        load_threshold=0.7,
        host="127.0.0.1",
        port=0,
        preload_modules=["numpy"],
    )
    server.rtc_session(entrypoint, agent_name=os.environ.get("AGENT_NAME", ""))
    await server.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(main())
