"""The voice agent of the scenarios: a livekit-agents worker that needs no key of a model.

The dispatch metadata selects what a job does: a JSON object with `behaviour` (a key of BEHAVIOURS, default `greet`) and
the settings of that behaviour. Each job writes its events to the file REPORT: one JSON object per line with `room`,
`event` and `at` (Unix seconds). These variables configure the worker:

  LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET   the server
  AGENT_NAME      the name to register; if it is empty, LiveKit sends the worker to every new room
  AGENT_LOAD      the load to report, 0 to 1 (a server sends no job to a worker above 0.7)
  AGENT_HIDDEN    if it is set, jobs join as hidden participants
  AGENT_POISONED  if it is set, jobs join and stay silent, whatever their order
  AGENT_THREADS   if it is set, jobs run in threads of the worker, and not in processes
  AGENT_NICENESS  the priority of a job once it has started; raising it needs root
  LIVEKIT_AGENT_DEPLOYMENT  the deployment to register
  REPORT          the path of the report
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
    JobExecutorType,
    WorkerPermissions,
)
from livekit.agents.voice.room_io import RoomOptions

from models import Llm, Stt, Tts
from tones import FRAME_MS, is_audible, is_tone, marked_speech, signal_of, silence_after, tone_of

SPEECH_RATE = 24_000
LISTEN_RATE = 16_000
# The frequency in the background sound in Hz. It is above the tone of every room. The sound contains a voice, too, so that a
# client that mistakes it for the agent hears speech.
BACKGROUND = 2_500
BACKGROUND_RATE = 48_000
# The size of a picture.
WIDTH = 320
HEIGHT = 240
# An echo begins after this many frames with the tone, and ends after this much silence.
BEGIN_FRAMES = 5
END_SECONDS = 0.4


def report(room: str, event: str, **details: object) -> None:
    """Appends one line to the report. With O_APPEND, lines of several processes do not mix."""
    line = json.dumps({"room": room, "event": event, "at": time.time(), **details}) + "\n"
    fd = os.open(os.environ["REPORT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


async def speech(frequency: int, seconds: float):
    """Speech, as fast as the consumer reads it."""
    for frame in marked_speech(frequency, seconds, SPEECH_RATE):
        yield frame


async def hear_echoes(room: str, track: rtc.Track, heard: asyncio.Queue) -> None:
    """Reports every period of the room's own tone in `track` after its end."""
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
        # A tone may end within a frame. The tone can be too small a part of that frame.
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
    """One job: its room, its behaviour, and the echoes that it hears."""

    def __init__(self, ctx: JobContext, order: dict):
        self.ctx = ctx
        self.order = order
        self.room = ctx.job.room.name
        self.heard = asyncio.Queue()
        self.listening = []
        self.speaks_since = None

    async def connect(self, encryption: rtc.E2EEOptions | None = None) -> None:
        await asyncio.sleep(self.order.get("connect_after", 0))
        self.ctx.room.on("track_subscribed", self.subscribed)
        report(self.room, "connecting")
        await self.ctx.connect(encryption=encryption)
        report(self.room, "connected", identity=self.ctx.room.local_participant.identity)

    def subscribed(self, track, publication, participant) -> None:
        # An agent listens only to this source, and not to its avatar.
        own = "lk.publish_on_behalf" in participant.attributes
        if publication.source == rtc.TrackSource.SOURCE_MICROPHONE and not own:
            caller, attributes = participant.identity, dict(participant.attributes)
            report(
                self.room,
                "caller",
                caller=caller,
                attributes=attributes,
                name=participant.name,
                metadata=participant.metadata,
                room_metadata=self.ctx.room.metadata,
            )
            self.listening.append(
                asyncio.create_task(hear_echoes(self.room, track, self.heard))
            )

    async def session(self, room_options: RoomOptions | None = None, **models) -> AgentSession:
        # vad=None: the bundled VAD costs CPU time, and no turn depends on it here.
        session = AgentSession(vad=None, **models)
        session.on("agent_state_changed", self.state_changed)
        options = {"room_options": room_options} if room_options else {}
        agent = Agent(instructions="")
        # Without models the session can't notice its caller, and what it reported would contradict its replies.
        await session.start(
            agent=agent, room=self.ctx.room, record=False, session_host=bool(models), **options
        )
        return session

    def state_changed(self, event: AgentStateChangedEvent) -> None:
        # The time from the request to the first frame is that of the framework. A caller waits for it, too.
        if event.new_state == "speaking":
            self.speaks_since = event.created_at

    async def say(self, session: AgentSession, event: str) -> None:
        seconds = self.order.get("seconds", 2)
        handle = session.say("(speech)", audio=speech(tone_of(self.room), seconds))
        await handle.wait_for_playout()
        report(self.room, event, began=self.speaks_since, ended=time.time())

    async def publish(
        self,
        queue_ms: int,
        room: rtc.Room | None = None,
        track_source: rtc.TrackSource.ValueType = rtc.TrackSource.SOURCE_MICROPHONE,
    ) -> rtc.LocalTrackPublication:
        """Publishes a voice that never speaks. With a queue it sends silence, without one it sends no packets."""
        self.source = rtc.AudioSource(SPEECH_RATE, 1, queue_size_ms=queue_ms)
        track = rtc.LocalAudioTrack.create_audio_track("voice", self.source)
        # With DTX almost no packets of silence would be sent.
        options = rtc.TrackPublishOptions(source=track_source, dtx=False)
        speaker = (room or self.ctx.room).local_participant
        return await speaker.publish_track(track, options)

    async def utter(self) -> None:
        """Speaks for `seconds` on the published voice, even if no participant has subscribed."""
        began = time.time()
        for frame in marked_speech(tone_of(self.room), self.order.get("seconds", 2), SPEECH_RATE):
            await self.source.capture_frame(frame)
        await self.source.wait_for_playout()
        report(self.room, "greeted", began=began, ended=time.time())

    async def play_background(self) -> None:
        """Plays an endless sound on a second track with the player of the SDK."""

        async def endless():
            while True:
                for frame in marked_speech(BACKGROUND, 1, BACKGROUND_RATE):
                    yield frame

        self.background = BackgroundAudioPlayer(ambient_sound=endless())
        await self.background.start(room=self.ctx.room)


async def greet(job: Job) -> None:
    """Speaks first, and then only listens."""
    await job.connect()
    await job.say(await job.session(), "greeted")


async def reply(job: Job) -> None:
    """Greets, and replies to the first echo."""
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
    """Greets and replies with models. The model that `failing` names raises `error`."""
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
    """Fails in its entrypoint, as with a missing key or a failed import."""
    raise RuntimeError("this agent fails before it connects")


async def blurt(job: Job) -> None:
    """Speaks as soon as its track is published. An agent without a session does not wait for a subscriber."""
    await job.connect()
    await job.publish(queue_ms=1000)
    await job.utter()


async def reply_and_leave(job: Job) -> None:
    await reply(job)
    job.ctx.shutdown("hangs up")


async def end_call(job: Job) -> None:
    """Greets and deletes the room, as EndCallTool does."""
    await job.connect()
    await job.say(await job.session(), "greeted")
    await job.ctx.delete_room()


async def close_session(job: Job) -> None:
    """Greets and closes the session, which deletes the room."""
    await job.connect()
    session = await job.session(room_options=RoomOptions(delete_room_on_close=True))
    await job.say(session, "greeted")
    await session.aclose()


async def greet_over_background(job: Job) -> None:
    await job.connect()
    session = await job.session()
    await job.play_background()
    await job.say(session, "greeted")


async def background_alone(job: Job) -> None:
    """Is silent for the whole call."""
    await job.connect()
    await job.publish(queue_ms=1000)
    await job.play_background()


async def speak_by_avatar(job: Job) -> None:
    """Publishes nothing. A second participant publishes on its behalf, as avatar workers do."""
    await job.connect()
    token = (
        api.AccessToken()
        .with_identity(f"avatar-{job.room}")
        .with_kind(job.order.get("kind", "agent"))
        .with_grants(api.VideoGrants(room_join=True, room=job.room))
        .with_attributes({"lk.publish_on_behalf": job.ctx.room.local_participant.identity})
    )
    job.avatar = rtc.Room()
    try:
        await job.avatar.connect(os.environ["LIVEKIT_URL"], token.to_jwt())
    except rtc.ConnectError as error:
        report(job.room, "turned_away", error=str(error))
        return
    publication = await job.publish(queue_ms=1000, room=job.avatar)
    await publication.wait_for_subscription()
    await job.utter()


async def speak_without_source(job: Job) -> None:
    """Greets on a track without a source, as an agent without a session may."""
    await job.connect()
    source = rtc.TrackSource.SOURCE_UNKNOWN
    publication = await job.publish(queue_ms=1000, track_source=source)
    await publication.wait_for_subscription()
    await job.utter()


async def greet_with_video(job: Job) -> None:
    """Publishes video, as an avatar does, then greets, and replies to the first echo."""
    await job.connect()
    source = rtc.VideoSource(WIDTH, HEIGHT)
    track = rtc.LocalVideoTrack.create_video_track("avatar", source)
    options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_CAMERA)
    await job.ctx.room.local_participant.publish_track(track, options)

    async def show() -> None:
        picture = bytes(WIDTH * HEIGHT * 4)
        while True:
            source.capture_frame(rtc.VideoFrame(WIDTH, HEIGHT, rtc.VideoBufferType.RGBA, picture))
            await asyncio.sleep(0.1)

    job.showing = asyncio.create_task(show())
    session = await job.session()
    await job.say(session, "greeted")
    await job.heard.get()
    await job.say(session, "replied")


async def deny_subscription(job: Job) -> None:
    """Speaks on a track to which no participant may subscribe."""
    await job.connect()
    job.ctx.room.local_participant.set_track_subscription_permissions(
        allow_all_participants=False
    )
    await job.publish(queue_ms=1000)
    await job.utter()


async def greet_encrypted(job: Job) -> None:
    """Greets with end-to-end encryption."""
    key = rtc.KeyProviderOptions(shared_key=b"a key that the canary does not have")
    await job.connect(rtc.E2EEOptions(key_provider_options=key))
    await job.say(await job.session(), "greeted")


async def restart_track(job: Job) -> None:
    """Greets, and replies to the first echo on a track that replaces the first one."""
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
        end_call,
        close_session,
        greet_over_background,
        background_alone,
        speak_by_avatar,
        speak_without_source,
        greet_with_video,
        deny_subscription,
        greet_encrypted,
        restart_track,
        no_track,
        no_packets,
        silence,
    )
}


def prioritise() -> None:
    """Puts the media of this job before the jobs that are still starting. Without it, their interpreters take the CPU time for
    which the audio of a call can't wait: the jitter buffer grows, and speech is lost."""
    if niceness := os.environ.get("AGENT_NICENESS"):
        for thread in os.listdir("/proc/self/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), int(niceness))


async def entrypoint(ctx: JobContext) -> None:
    prioritise()
    metadata = ctx.job.metadata
    report(ctx.job.room.name, "job", pid=os.getpid(), metadata=metadata)
    order = json.loads(metadata) if metadata else {}
    behaviour = order.get("behaviour", "greet")
    if os.environ.get("AGENT_POISONED") and behaviour != "nothing":
        behaviour = "silence"
    await BEHAVIOURS[behaviour](Job(ctx, order))


def claimed_load(*_) -> float:
    return float(os.environ.get("AGENT_LOAD", "0"))


async def serve(entrypoint, **options) -> None:
    """Runs a worker whose jobs start with `entrypoint`, until it is stopped."""
    threads = os.environ.get("AGENT_THREADS")
    server = AgentServer(
        job_executor_type=JobExecutorType.THREAD if threads else JobExecutorType.PROCESS,
        # On a loaded machine the start of an interpreter takes several seconds. The default timeout of 10 s is too short.
        initialize_process_timeout=60,
        load_fnc=claimed_load,
        load_threshold=0.7,
        host="127.0.0.1",
        port=0,
        **options,
    )
    server.rtc_session(entrypoint, agent_name=os.environ.get("AGENT_NAME", ""))
    await server.run()


def run(worker) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(worker)


if __name__ == "__main__":
    hidden = bool(os.environ.get("AGENT_HIDDEN"))
    permissions = WorkerPermissions(hidden=hidden)
    run(serve(entrypoint, num_idle_processes=1, permissions=permissions, preload_modules=["numpy"]))
