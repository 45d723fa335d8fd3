"""Models that need no network: an LLM, a TTS and an STT that respond at once, or raise the exception of a provider's plugin.

The STT recognises only the tone of the room. A session with all three takes turns by it, and measures each turn as with
real models.
"""

import asyncio

from livekit.agents import APIConnectionError, APIError, APIStatusError, llm, stt, tts

from tones import FRAME_MS, is_tone, marked_speech, signal_of

RATE = 24_000
# An utterance begins after this many consecutive frames with the tone, and ends after this many without it.
BEGIN_FRAMES = 5
END_FRAMES = 20


def provider_error(kind: str) -> Exception:
    """The exception that plugins raise for a response of the provider."""
    match kind:
        case "429":
            return APIStatusError("Too Many Requests", status_code=429, retryable=True)
        case "quota":
            return APIError("inference_quota_exceeded: the plan's inference is used up", retryable=False)
        case "500":
            return APIStatusError("the model is on fire", status_code=500, retryable=False)
        case "connection":
            return APIConnectionError("no such host", retryable=False)
    raise ValueError(kind)


class Llm(llm.LLM):
    """Replies to everything with `text`, or raises `error` if it is set."""

    def __init__(self, text: str, error: str | None = None):
        super().__init__()
        self.text, self.error = text, error

    def chat(self, *, chat_ctx, tools=None, conn_options, **_) -> llm.LLMStream:
        return LlmStream(self, chat_ctx=chat_ctx, tools=tools or [], conn_options=conn_options)


class LlmStream(llm.LLMStream):
    async def _run(self) -> None:
        if self._llm.error:
            raise provider_error(self._llm.error)
        for word in self._llm.text.split(" "):
            delta = llm.ChoiceDelta(role="assistant", content=word + " ")
            self._event_ch.send_nowait(llm.ChatChunk(id="answer", delta=delta))


class Tts(tts.TTS):
    """Speaks every text as speech of `seconds` with a tone, or raises `error` if it is set."""

    def __init__(self, frequency: int, seconds: float, error: str | None = None):
        capabilities = tts.TTSCapabilities(streaming=False)
        super().__init__(capabilities=capabilities, sample_rate=RATE, num_channels=1)
        self.frequency, self.seconds, self.error = frequency, seconds, error

    def synthesize(self, text: str, *, conn_options) -> tts.ChunkedStream:
        return TtsStream(tts=self, input_text=text, conn_options=conn_options)


class TtsStream(tts.ChunkedStream):
    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        if self._tts.error:
            raise provider_error(self._tts.error)
        output_emitter.initialize(
            request_id="speech", sample_rate=RATE, num_channels=1, mime_type="audio/pcm"
        )
        for frame in marked_speech(self._tts.frequency, self._tts.seconds, RATE):
            output_emitter.push(bytes(frame.data))
        output_emitter.flush()


class Stt(stt.STT):
    """Transcribes an utterance of the tone as `text`, or raises `error` at once if it is set."""

    RATE = 16_000

    def __init__(self, frequency: int, text: str, error: str | None = None):
        capabilities = stt.STTCapabilities(streaming=True, interim_results=True)
        super().__init__(capabilities=capabilities)
        self.frequency, self.text, self.error = frequency, text, error

    async def _recognize_impl(self, buffer, *, language, conn_options) -> stt.SpeechEvent:
        raise NotImplementedError("it only streams")

    def stream(self, *, language=None, conn_options) -> stt.RecognizeStream:
        return SttStream(stt=self, conn_options=conn_options, sample_rate=Stt.RATE)


class SttStream(stt.RecognizeStream):
    async def _run(self) -> None:
        if self._stt.error:
            raise provider_error(self._stt.error)
        heard = silent = 0
        buffered = b""
        size = 2 * Stt.RATE * FRAME_MS // 1000
        async for pushed in self._input_ch:
            if isinstance(pushed, self._FlushSentinel):
                continue
            buffered += bytes(pushed.data)
            while len(buffered) >= size:
                piece, buffered = buffered[:size], buffered[size:]
                if is_tone(signal_of(Piece(piece)), self._stt.frequency, Stt.RATE):
                    heard, silent = heard + 1, 0
                    if heard == BEGIN_FRAMES:
                        self.say(stt.SpeechEventType.START_OF_SPEECH)
                        first_word = self._stt.text.split(" ")[0]
                        self.say(stt.SpeechEventType.INTERIM_TRANSCRIPT, first_word)
                else:
                    silent += 1
                    if silent == END_FRAMES:
                        if heard >= BEGIN_FRAMES:
                            self.say(stt.SpeechEventType.FINAL_TRANSCRIPT, self._stt.text)
                            self.say(stt.SpeechEventType.END_OF_SPEECH)
                        heard = 0

    def say(self, kind: stt.SpeechEventType, text: str | None = None) -> None:
        said = [] if text is None else [stt.SpeechData(language="en", text=text, confidence=1.0)]
        self._event_ch.send_nowait(stt.SpeechEvent(type=kind, alternatives=said))


class Piece:
    """Samples instead of a frame."""

    def __init__(self, data: bytes):
        self.data = data
