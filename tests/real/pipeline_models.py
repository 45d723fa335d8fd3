"""The models of a conversation, which need no network: an LLM that replies from a list, a TTS that speaks with espeak-ng, and an
STT that is told what was said and only has to notice when. Each takes the time that the job's order sets for it.
"""

import asyncio
import collections
import re
import time
from collections.abc import Callable

import numpy as np

from livekit.agents import llm, stt, tts
from livekit.local_inference import VAD, VAD_WINDOW_SAMPLES

import voice
from models import provider_error

LISTEN_RATE = 16_000
WINDOW_SECONDS = VAD_WINDOW_SAMPLES / LISTEN_RATE
# An utterance begins after this many consecutive windows of speech.
BEGIN_WINDOWS = 3
# The windows before the first speech that belong to an utterance: the VAD notices soft speech late.
BEFORE_WINDOWS = 12
# An interim transcript comes after this many windows of an utterance.
INTERIM_WINDOWS = 12
# The STT has heard all of an utterance if it has heard this share of its speech.
WHOLE = 0.8

Report = Callable[..., None]


class Llm(llm.LLM):
    """Replies to the user's n-th message with the n-th of `replies`, or raises `error` if it is set.

    `calls` has the tools to call: the number of a message, counted from 1, and the tool's name.
    """

    def __init__(
        self,
        replies: list[str],
        calls: dict[str, str],
        delay: float,
        error: str | None,
        report: Report,
    ):
        super().__init__()
        self.replies, self.calls, self.delay, self.error = replies, calls, delay, error
        self.report = report
        self.requests = 0

    def chat(self, *, chat_ctx, tools=None, conn_options, **_) -> llm.LLMStream:
        return LlmStream(self, chat_ctx=chat_ctx, tools=tools or [], conn_options=conn_options)


class LlmStream(llm.LLMStream):
    async def _run(self) -> None:
        model = self._llm
        model.requests += 1
        items = self._chat_ctx.items
        said = [item for item in items if item.type == "message" and item.role == "user"]
        number = max(len(said), 1)
        model.report("llm", number=model.requests, message=number)
        await asyncio.sleep(model.delay)
        if model.error == "hang":
            await asyncio.Event().wait()
        if model.error:
            raise provider_error(model.error)
        call = model.calls.get(str(number))
        if call and items[-1].type != "function_call_output":
            tool_call = llm.FunctionToolCall(name=call, arguments="{}", call_id=f"call-{number}")
            self.send(llm.ChoiceDelta(role="assistant", tool_calls=[tool_call]))
            return
        reply = model.replies[min(number, len(model.replies)) - 1]
        for word in reply.split(" "):
            self.send(llm.ChoiceDelta(role="assistant", content=word + " "))

    def send(self, delta: llm.ChoiceDelta) -> None:
        self._event_ch.send_nowait(llm.ChatChunk(id="reply", delta=delta))


class Tts(tts.TTS):
    """Speaks with espeak-ng, `gain` dB louder than voice.LEVEL, or raises `error` if it is set."""

    def __init__(self, delay: float, gain: float, error: str | None):
        capabilities = tts.TTSCapabilities(streaming=True)
        super().__init__(capabilities=capabilities, sample_rate=voice.RATE, num_channels=1)
        self.delay, self.gain, self.error = delay, gain, error

    def synthesize(self, text: str, *, conn_options) -> tts.ChunkedStream:
        raise NotImplementedError("it only streams")

    def stream(self, *, conn_options=None) -> tts.SynthesizeStream:
        return TtsStream(tts=self, conn_options=conn_options)


class TtsStream(tts.SynthesizeStream):
    """One stream speaks one text. It waits for the whole text: the LLM sends all of it at once."""

    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        output_emitter.initialize(
            request_id="speech",
            sample_rate=voice.RATE,
            num_channels=1,
            mime_type="audio/pcm",
            stream=True,
        )
        output_emitter.start_segment(segment_id="speech")
        text = ""
        async for pushed in self._input_ch:
            text += "" if isinstance(pushed, self._FlushSentinel) else pushed
        if text.strip():
            self._mark_started()
            model = self._tts
            await asyncio.sleep(model.delay)
            if model.error == "hang":
                await asyncio.Event().wait()
            if model.error:
                raise provider_error(model.error)
            signal = await asyncio.to_thread(voice.speech, text)
            output_emitter.push(voice.pcm(signal, model.gain))
        output_emitter.end_input()


class Stt(stt.STT):
    """Notices when the caller speaks, and gets the text from `expect`: what a new utterance says and how many seconds of it are
    speech, or None if the last utterance goes on after a pause.

    An utterance that pauses is transcribed in several parts. Each is final `delay` seconds after its end. With `sentences`, the
    STT really recognises which of them it hears.
    """

    def __init__(
        self,
        expect: Callable[[], tuple[str, float] | None],
        delay: float,
        planted_errors: int,
        sentences: list[str],
        error: str | None,
        report: Report,
    ):
        capabilities = stt.STTCapabilities(streaming=True, interim_results=True)
        super().__init__(capabilities=capabilities)
        self.expect, self.delay, self.error = expect, delay, error
        self.planted_errors = planted_errors
        self.recogniser = Recogniser(sentences) if sentences else None
        self.report = report

    async def _recognize_impl(self, buffer, *, language, conn_options) -> stt.SpeechEvent:
        raise NotImplementedError("it only streams")

    def stream(self, *, language=None, conn_options) -> stt.RecognizeStream:
        return SttStream(stt=self, conn_options=conn_options, sample_rate=LISTEN_RATE)


class Recogniser:
    """Speech recognition by PocketSphinx, whose package contains its model of English. It knows only `sentences`."""

    def __init__(self, sentences: list[str]):
        # It is imported late, because few jobs need it.
        from pocketsphinx import Decoder

        self.sentences = [re.sub("[^a-z ]", "", sentence.lower()) for sentence in sentences]
        known = " | ".join(self.sentences)
        self.decoder = Decoder(samprate=LISTEN_RATE, lm=None, loglevel="FATAL")
        grammar = f"#JSGF V1.0; grammar known; public <speech> = ({known})+;"
        self.decoder.add_jsgf_string("known", grammar)
        self.decoder.activate_search("known")

    def recognise(self, signal: np.ndarray) -> str:
        self.decoder.start_utt()
        self.decoder.process_raw(signal.astype(np.int16).tobytes(), full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return self.whole_sentences(found.hypstr) if found else ""

    def whole_sentences(self, heard: str) -> str:
        """Without a last word that only begins a sentence: PocketSphinx takes a noise at the end for one."""
        whole = ""
        while True:
            longer = [f"{whole} {sentence}".strip() for sentence in self.sentences]
            found = [text for text in longer if f"{heard} ".startswith(f"{text} ")]
            if not found:
                return whole
            whole = found[0]


class SttStream(stt.RecognizeStream):
    async def _run(self) -> None:
        if self._stt.error:
            raise provider_error(self._stt.error)
        self.words: list[str] = []
        self.part = Part()
        vad = VAD()
        buffered = np.zeros(0, dtype=np.int16)
        clock = Clock()
        async for pushed in self._input_ch:
            if isinstance(pushed, self._FlushSentinel):
                continue
            clock.advance(pushed.duration)
            buffered = np.concatenate([buffered, np.frombuffer(pushed.data, dtype=np.int16)])
            while len(buffered) >= VAD_WINDOW_SAMPLES:
                window, buffered = (
                    buffered[:VAD_WINDOW_SAMPLES],
                    buffered[VAD_WINDOW_SAMPLES:],
                )
                now = clock.now() - len(buffered) / LISTEN_RATE
                self.listen(window, vad.predict(window) > 0.5, now)

    def listen(self, window: np.ndarray, speaks: bool, now: float) -> None:
        part = self.part
        part.windows.append(window)
        if speaks:
            part.speech, part.silent = part.speech + 1, 0
        elif part.began:
            part.silent += 1
        else:
            part.speech = 0
            part.windows = part.windows[-BEFORE_WINDOWS:]
        if part.speech == BEGIN_WINDOWS and not part.began:
            part.began = True
            self.begin()
        if part.speech == INTERIM_WINDOWS and speaks:
            self.send(stt.SpeechEventType.INTERIM_TRANSCRIPT, " ".join(self.words[:2]))
        if part.silent and part.silent * WINDOW_SECONDS >= self._stt.delay:
            self.end(now)
            self.part = Part()

    def begin(self) -> None:
        expected = self._stt.expect()
        if not expected and not self.words:
            expected = ("Hello?", 0.0)
        if expected:
            text, self.expected_seconds = expected
            self.words = text.split()
            wrong = min(self._stt.planted_errors, len(self.words))
            self.words[:wrong] = ["wrong"] * wrong
            self.total = len(self.words)
            self.heard_seconds = 0.0
        self.send(stt.SpeechEventType.START_OF_SPEECH)

    def end(self, now: float) -> None:
        """Sends as much of the text as was heard of its speech."""
        signal = np.concatenate(self.part.windows).astype(np.float64)
        self.heard_seconds += voice.voiced_seconds(signal, LISTEN_RATE)
        expected = self.expected_seconds
        share = self.heard_seconds / expected if expected else 1.0
        left = 0 if share >= WHOLE else self.total - round(share * self.total)
        count = max(len(self.words) - left, 0)
        text, self.words = " ".join(self.words[:count]), self.words[count:]
        if recogniser := self._stt.recogniser:
            text = recogniser.recognise(signal)
        first, last = voice.edges(signal, LISTEN_RATE)
        start = now - len(signal) / LISTEN_RATE
        self._stt.report("heard", began=start + first, ended=start + last, text=text, share=share)
        if text:
            self.send(stt.SpeechEventType.FINAL_TRANSCRIPT, text)
        self.send(stt.SpeechEventType.END_OF_SPEECH)

    def send(self, kind: stt.SpeechEventType, text: str | None = None) -> None:
        said = [] if text is None else [stt.SpeechData(language="en", text=text, confidence=1.0)]
        self._event_ch.send_nowait(stt.SpeechEvent(type=kind, alternatives=said))


class Part:
    """A part of an utterance, from the first speech to a pause."""

    def __init__(self):
        self.began = False
        # Begins before the first speech and ends with the pause.
        self.windows: list[np.ndarray] = []
        self.speech = 0
        self.silent = 0


class Clock:
    """When each sample was played, by the samples before it: the session hands over 50 ms at a time, and some of it late."""

    FRAMES = 60

    def __init__(self):
        self.seconds = 0.0
        self.origins = collections.deque(maxlen=self.FRAMES)

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
        self.origins.append(time.time() - self.seconds)

    def now(self) -> float:
        return min(self.origins) + self.seconds
