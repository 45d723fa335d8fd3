use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use proptest::collection::vec;
use proptest::prelude::*;
use ropus::{Application, Channels, Encoder};

use super::ogg_opus::tests::{decode, peaks};
use super::*;
use crate::livekit::RoomName;
use crate::livekit::audio::recording::{self, SoundPacket};
use crate::livekit::audio::rtp::RtpHeader;
use crate::livekit::event::Speaker;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Speech-like sound in packets of 20 ms: loud in the first 400 ms of each second.
fn speech(seconds: usize) -> Vec<Arc<[u8]>> {
    let mut encoder = Encoder::builder(48_000, Channels::Mono, Application::Voip)
        .build()
        .unwrap();
    let mut phase = 0.0_f32;
    let packet = |number: usize| {
        let loud = if number % 50 < 20 { 0.5 } else { 0.0 };
        let mut pcm = Vec::new();
        for _ in 0..960 {
            phase += 220.0 / 48_000.0;
            pcm.push(loud * (phase * std::f32::consts::TAU).sin());
        }
        let mut packet = vec![0; 1_500];
        let length = encoder.encode_float(&pcm, &mut packet).unwrap();
        packet.truncate(length);
        Arc::from(packet)
    };
    (0..seconds * 50).map(packet).collect()
}

/// A call in which the agent's packets arrive from 300 ms on. `arrives` decides for each packet how late it arrives, and whether.
fn call(seconds: usize, arrives: impl Fn(usize) -> Option<u64>) -> CallRecording {
    let started = Instant::now();
    let mut sound = CallSound::new(true);
    sound.start(started);
    let mut packets: Vec<SoundPacket> = Vec::new();
    for (number, payload) in speech(seconds).into_iter().enumerate() {
        let Some(late) = arrives(number) else {
            continue;
        };
        packets.push(SoundPacket {
            at: started + ms(300 + number as u64 * 20 + late),
            header: RtpHeader {
                ssrc: 5,
                sequence: 1_000 + number as u64,
                timestamp: u32::try_from(number * 960).unwrap(),
            },
            payload,
        });
    }
    packets.sort_by_key(|packet| packet.at);
    for packet in packets {
        sound.on_packet(Speaker::Agent, || packet);
    }
    let left = started + ms(300 + 1_000 * seconds as u64 + 500);
    of_call(sound, left).unwrap().1.unwrap()
}

pub(crate) fn sample_call(length: Duration) -> CallRecording {
    call(usize::try_from(length.as_secs()).unwrap(), |_| Some(0))
}

fn agent_pcm(recording: CallRecording) -> Vec<i16> {
    let (_, [agent, caller]) = recording.into_files();
    assert!(caller.is_none());
    decode(&agent.unwrap().content)
}

/// The first loud and the last loud 20 ms of each second of speech.
fn loud(pcm: &[i16], seconds: usize) -> Vec<(usize, usize)> {
    let peaks = peaks(pcm);
    let of = |second: usize| {
        let from = 15 + second * 50;
        let loud: Vec<usize> = (from..from + 50).filter(|it| peaks[*it] > 6_000).collect();
        (loud[0] - from, loud[loud.len() - 1] - from)
    };
    (0..seconds).map(of).collect()
}

#[test]
fn loss_leaves_gaps_and_shifts_nothing() {
    let whole = agent_pcm(call(10, |_| Some(0)));
    // A twentieth is lost, without the packets at an end of speech.
    let is_lost = |number: usize| number % 20 == 7;
    let lossy = agent_pcm(call(10, |number| (!is_lost(number)).then_some(0)));
    assert_eq!(whole.len(), 48 * 10_800);
    assert_eq!(lossy.len(), whole.len());
    assert_eq!(loud(&lossy, 10), loud(&whole, 10));
    let lost_speech =
        (0..500).filter(|number| is_lost(*number) && (2..18).contains(&(number % 50)));
    for number in lost_speech {
        // The decoder fades out for the first milliseconds of a gap.
        let from = 48 * (300 + number * 20 + 12);
        let in_gap = |pcm: &[i16]| recording::peak(&pcm[from..from + 48 * 6]);
        assert!(in_gap(&whole) > 3_000, "{number}");
        assert!(in_gap(&lossy) < 300, "{number}: {}", in_gap(&lossy));
    }
}

#[test]
fn jitter_and_reordering_change_nothing() {
    let whole = agent_pcm(call(5, |_| Some(0)));
    // Up to 90 ms late, so that packets overtake each other.
    let jittery = agent_pcm(call(5, |number| Some(number as u64 * 37 % 91)));
    assert!(whole == jittery);
}

#[test]
fn both_tracks_have_the_duration_of_the_call_and_a_silent_side_has_no_file() {
    let (started, [agent, caller]) = {
        let mut recording = call(1, |_| Some(0));
        recording.packets.caller.list = recording.packets.agent.list[..3].to_vec();
        recording.into_files()
    };
    let [agent, caller] = [agent, caller].map(Option::unwrap);
    assert_eq!(agent.duration, ms(1_800));
    assert_eq!(decode(&agent.content).len(), 48 * 1_800);
    assert_eq!(decode(&caller.content).len(), 48 * 1_800);
    assert!(started <= Instant::now());
    assert!(caller.content.len() < agent.content.len());
}

#[test]
fn levels_are_in_proportion_to_decibels() {
    let levels = [0, 1, 32, 33, 328, 3_277, 16_384, 32_767, 32_768].map(level);
    assert_eq!(levels, [0, 0, 0, 0, 33, 67, 90, 100, 100]);
    let levels = CallLevels {
        step: ms(100),
        agent: vec![0, 32_768],
        caller: Vec::new(),
    };
    let waveform = Waveform::new(Instant::now(), &levels);
    assert_eq!(waveform.agent, Some(vec![0, 100]));
    assert_eq!(waveform.caller, None);
}

proptest! {
    #[test]
    fn file_of_arbitrary_packets_can_be_read_to_its_end(
        packets in vec((0..3_000_u64, 0..3_u32, any::<u16>(), any::<u32>(), vec(any::<u8>(), 0..40)), 0..60),
    ) {
        let started = Instant::now();
        let mut sound = CallSound::new(true);
        sound.start(started);
        for (at, ssrc, sequence, timestamp, payload) in packets {
            sound.on_packet(Speaker::Agent, || SoundPacket {
                at: started + ms(at),
                header: RtpHeader { ssrc, sequence: sequence.into(), timestamp },
                payload: payload.into(),
            });
        }
        let (_, recording) = of_call(sound, started + ms(2_000)).unwrap();
        let (_, [agent, _]) = recording.unwrap().into_files();
        if let Some(agent) = agent {
            let mut reader = ogg::PacketReader::new(std::io::Cursor::new(&agent.content));
            let mut end = 0;
            while let Some(packet) = reader.read_packet().unwrap() {
                prop_assert!(packet.absgp_page() >= end);
                end = packet.absgp_page();
            }
            prop_assert_eq!(end, 3_840 + 48 * 2_000);
        }
    }
}

/// A folder of a daemon that holds this many bytes, and how many bytes the recording of [`call`] has.
fn store(max_bytes: u64) -> (tempfile::TempDir, RecordingStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = RecordingStore::open(folder.path().join("state/recordings"), max_bytes);
    (folder, store)
}

async fn save(store: &RecordingStore, room: &str) -> std::io::Result<SavedRecording> {
    let room = RoomName(room.to_owned());
    store.save(&room, call(1, |_| Some(0))).await
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[tokio::test]
async fn files_are_private_complete_and_named_after_room_and_track() {
    let (folder, store) = store(u64::MAX);
    let saved = save(&store, "canary-1").await.unwrap();
    let dir = folder.path().join("state/recordings");
    assert_eq!(names(&dir), ["canary-1.agent.ogg"]);
    let agent = saved.agent.unwrap();
    assert_eq!(saved.caller, None);
    assert_eq!(agent.duration, ms(1_800));
    let file = dir.join("canary-1.agent.ogg");
    assert_eq!(fs::metadata(&file).unwrap().len(), agent.bytes);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&file)), (0o700, 0o600));
    let found = store.read("canary-1", Speaker::Agent).unwrap().unwrap();
    assert_eq!(found.bytes, agent.bytes);
    assert!(store.read("canary-1", Speaker::Caller).unwrap().is_none());
}

#[tokio::test]
async fn name_of_a_room_cannot_leave_the_folder() {
    let (folder, store) = store(u64::MAX);
    save(&store, "canary-1").await.unwrap();
    fs::write(folder.path().join("state/other.agent.ogg"), "x").unwrap();
    let long = "a".repeat(300);
    for room in [
        "../other",
        "/etc/other",
        "a/b",
        "a\\b",
        "a\0b",
        "",
        "..%2Fother",
        &long,
    ] {
        assert!(
            store.read(room, Speaker::Agent).unwrap().is_none(),
            "{room}"
        );
        let error = save(&store, room).await.unwrap_err();
        assert!(error.to_string().contains("no file name"), "{error}");
    }
    let dir = folder.path().join("state/recordings");
    assert_eq!(names(&dir), ["canary-1.agent.ogg"]);
    assert_eq!(
        names(&folder.path().join("state")),
        ["other.agent.ogg", "recordings"]
    );
}

#[tokio::test]
async fn oldest_recordings_are_deleted_above_the_limit() {
    let bytes = {
        let (_folder, store) = store(u64::MAX);
        save(&store, "a").await.unwrap().agent.unwrap().bytes
    };
    let (folder, store) = store(bytes * 2 + 10);
    for room in ["c", "b", "a"] {
        save(&store, room).await.unwrap();
        // File systems may have a coarse clock: names decide then.
        tokio::time::sleep(ms(20)).await;
    }
    let dir = folder.path().join("state/recordings");
    assert_eq!(names(&dir), ["a.agent.ogg", "b.agent.ogg"]);
    assert_eq!(store.take_deleted(), ["c"]);
    assert_eq!(store.take_deleted(), [""; 0]);

    // The next run knows them, and a smaller limit holds from its first recording on.
    let next = RecordingStore::open(dir.clone(), bytes + 10);
    save(&next, "d").await.unwrap();
    assert_eq!(names(&dir), ["d.agent.ogg"]);
    assert_eq!(next.take_deleted(), ["b", "a"]);
}

#[tokio::test]
async fn recordings_expire_by_age_and_are_deleted_by_room() {
    let (folder, store) = store(u64::MAX);
    for room in ["a", "b", "c", "d"] {
        save(&store, room).await.unwrap();
    }
    let dir = folder.path().join("state/recordings");
    store.delete(["b".to_owned(), "unknown".to_owned()]);
    assert_eq!(store.take_deleted(), ["b"]);
    store.discard(["c".to_owned()]);
    assert_eq!(names(&dir).len(), 3);
    store.delete_discarded();
    assert_eq!(names(&dir), ["a.agent.ogg", "d.agent.ogg"]);
    store.expire(SystemTime::now() - Duration::from_hours(1));
    assert_eq!(names(&dir).len(), 2);
    store.expire(SystemTime::now() + Duration::from_hours(1));
    assert_eq!(names(&dir), [""; 0]);
    let mut deleted = store.take_deleted();
    deleted.sort();
    assert_eq!(deleted, ["a", "c", "d"]);
}

#[tokio::test]
async fn start_removes_incomplete_files_and_sweeps_recordings_without_a_probe() {
    let (folder, store) = store(u64::MAX);
    for room in ["known", "orphan"] {
        save(&store, room).await.unwrap();
    }
    let dir = folder.path().join("state/recordings");
    fs::write(dir.join(".recording-x.tmp"), "half").unwrap();
    fs::write(dir.join("notes.txt"), "of the user").unwrap();
    let next = RecordingStore::open(dir.clone(), u64::MAX);
    // A recording of this run, whose probe is not in the history yet.
    save(&next, "new").await.unwrap();
    next.sweep(|_| Err("the disk is full")).unwrap_err();
    let swept: Result<(), &str> = next.sweep(|room| Ok(room == "known"));
    swept.unwrap();
    assert_eq!(
        names(&dir),
        ["known.agent.ogg", "new.agent.ogg", "notes.txt"]
    );
}

#[tokio::test]
async fn folder_that_cannot_be_written_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    let store = RecordingStore::open(folder.path().join("file/recordings"), u64::MAX);
    save(&store, "a").await.unwrap_err();
    RecordingStore::open_unmanaged(&folder.path().join("file")).unwrap_err();
    let own = folder.path().join("own/folder");
    let store = RecordingStore::open_unmanaged(&own).unwrap();
    assert_eq!(names(&own), [""; 0]);
    save(&store, "a").await.unwrap();
    assert_eq!(names(&own), ["a.agent.ogg"]);
}
