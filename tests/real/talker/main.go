// The agent of the benchmark: a worker that accepts every job, joins its room, is silent until all participants have
// subscribed, and then speaks without pauses.
//
// A livekit-agents job would use 4 % of a core for this, mostly for encoding. With 50 rooms, the agents would leave no CPU time
// to the server and the canary on a small machine. This worker repeats packets that are already encoded.
//
//	talker URL AGENT_NAME PACKETS
//
// PACKETS is a file of Opus packets of 20 ms. Before each packet is its length as two bytes, the high byte first. The key pair is
// in LIVEKIT_API_KEY and LIVEKIT_API_SECRET. The worker prints "registered worker" when it is ready. For each room it prints
// "talking ROOM AT" when it begins to speak: AT is the time just before the first packet of speech, in Unix seconds.
package main

import (
	"encoding/binary"
	"fmt"
	"log"
	"net/http"
	"os"
	"time"

	"github.com/gorilla/websocket"
	"github.com/pion/webrtc/v4"
	"github.com/pion/webrtc/v4/pkg/media"
	"google.golang.org/protobuf/proto"

	"github.com/livekit/protocol/auth"
	"github.com/livekit/protocol/livekit"
	"github.com/livekit/protocol/signalling"
)

const (
	packetLength = 20 * time.Millisecond
	pingInterval = 5 * time.Second
	// The number of silent packets before the first packet of speech. Participants that subscribe during them hear the
	// beginning of the speech.
	lead  = 150
	track = "voice"
)

func main() {
	url, name, file := os.Args[1], os.Args[2], os.Args[3]
	packets, err := readPackets(file)
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(work(url, name, packets))
}

func readPackets(file string) ([][]byte, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var packets [][]byte
	for len(data) > 0 {
		length := 2 + int(binary.BigEndian.Uint16(data))
		packets = append(packets, data[2:length])
		data = data[length:]
	}
	return packets, nil
}

// silence is one CELT frame of 20 ms without energy (RFC 6716).
var silence = []byte{0xf8, 0xff, 0xfe}

// work registers with the server and serves it until the connection ends.
func work(url, name string, packets [][]byte) error {
	token, err := auth.NewAccessToken(os.Getenv("LIVEKIT_API_KEY"), os.Getenv("LIVEKIT_API_SECRET")).
		SetVideoGrant(&auth.VideoGrant{Agent: true}).
		ToJWT()
	if err != nil {
		return err
	}
	conn, err := dial(url+"/agent", token)
	if err != nil {
		return err
	}
	send := func(message *livekit.WorkerMessage) error { return write(conn, message) }
	err = send(&livekit.WorkerMessage{Message: &livekit.WorkerMessage_Register{
		Register: &livekit.RegisterWorkerRequest{Type: livekit.JobType_JT_ROOM, AgentName: name},
	}})
	for err == nil {
		var message livekit.ServerMessage
		if err = read(conn, &message); err != nil {
			break
		}
		switch content := message.Message.(type) {
		case *livekit.ServerMessage_Register:
			fmt.Println("registered worker")
		case *livekit.ServerMessage_Availability:
			job := content.Availability.Job
			err = send(&livekit.WorkerMessage{Message: &livekit.WorkerMessage_Availability{
				Availability: &livekit.AvailabilityResponse{
					JobId:               job.Id,
					Available:           true,
					ParticipantIdentity: "agent-" + job.Id,
				},
			}})
		case *livekit.ServerMessage_Assignment:
			go func() {
				if err := talk(url, content.Assignment, packets); err != nil {
					log.Printf("%s: %v", content.Assignment.Job.Room.Name, err)
				}
			}()
		}
	}
	return err
}

// call is one room: the signal connection and the transport that carries the voice.
type call struct {
	room    string
	packets [][]byte
	conn    *websocket.Conn
	peer    *webrtc.PeerConnection
	voice   *webrtc.TrackLocalStaticSample
	send    chan *livekit.SignalRequest
	// Closed when the call is over.
	done chan struct{}
}

// talk joins the room of a job and speaks until the server ends the call.
func talk(url string, job *livekit.JobAssignment, packets [][]byte) error {
	conn, err := dial(url+"/rtc?protocol=16&auto_subscribe=0", job.Token)
	if err != nil {
		return err
	}
	defer conn.Close()
	voice, err := webrtc.NewTrackLocalStaticSample(
		webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeOpus, ClockRate: 48000, Channels: 2},
		track, track,
	)
	if err != nil {
		return err
	}
	c := &call{
		room:    job.Job.Room.Name,
		packets: packets,
		conn:    conn,
		voice:   voice,
		send:    make(chan *livekit.SignalRequest, 64),
		done:    make(chan struct{}),
	}
	defer close(c.done)
	go c.write()
	for {
		var message livekit.SignalResponse
		if err := read(conn, &message); err != nil {
			return err
		}
		switch content := message.Message.(type) {
		case *livekit.SignalResponse_Join:
			c.send <- &livekit.SignalRequest{Message: &livekit.SignalRequest_AddTrack{
				AddTrack: &livekit.AddTrackRequest{
					Cid:    track,
					Name:   track,
					Type:   livekit.TrackType_AUDIO,
					Source: livekit.TrackSource_MICROPHONE,
				},
			}}
		case *livekit.SignalResponse_TrackPublished:
			if err := c.offer(); err != nil {
				return err
			}
			defer c.peer.Close()
		case *livekit.SignalResponse_Answer:
			answer, _, _ := signalling.FromProtoSessionDescription(content.Answer)
			if err := c.peer.SetRemoteDescription(answer); err != nil {
				return err
			}
		case *livekit.SignalResponse_Trickle:
			if err := c.candidate(content.Trickle); err != nil {
				return err
			}
		case *livekit.SignalResponse_Leave:
			return nil
		}
	}
}

// offer opens the one transport, towards the server.
func (c *call) offer() error {
	peer, err := webrtc.NewPeerConnection(webrtc.Configuration{})
	if err != nil {
		return err
	}
	c.peer = peer
	if _, err := peer.AddTrack(c.voice); err != nil {
		return err
	}
	peer.OnICECandidate(func(candidate *webrtc.ICECandidate) {
		if candidate == nil {
			return
		}
		trickle := signalling.ToProtoTrickle(candidate.ToJSON(), livekit.SignalTarget_PUBLISHER, false)
		c.queue(&livekit.SignalRequest{Message: &livekit.SignalRequest_Trickle{Trickle: trickle}})
	})
	peer.OnConnectionStateChange(func(state webrtc.PeerConnectionState) {
		if state == webrtc.PeerConnectionStateConnected {
			go c.speak()
		}
	})
	offer, err := peer.CreateOffer(nil)
	if err != nil {
		return err
	}
	if err := peer.SetLocalDescription(offer); err != nil {
		return err
	}
	c.queue(&livekit.SignalRequest{Message: &livekit.SignalRequest_Offer{
		Offer: &livekit.SessionDescription{Type: "offer", Sdp: offer.SDP, Id: 1},
	}})
	return nil
}

func (c *call) candidate(trickle *livekit.TrickleRequest) error {
	if trickle.Target != livekit.SignalTarget_PUBLISHER || c.peer == nil {
		return nil
	}
	candidate, err := signalling.FromProtoTrickle(trickle)
	if err != nil {
		return err
	}
	return c.peer.AddICECandidate(candidate)
}

func (c *call) speak() {
	tick := time.NewTicker(packetLength)
	defer tick.Stop()
	for i := -lead; ; i++ {
		select {
		case <-tick.C:
			data := silence
			if i >= 0 {
				data = c.packets[i%len(c.packets)]
			}
			if i == 0 {
				fmt.Printf("talking %s %.6f\n", c.room, float64(time.Now().UnixMicro())/1e6)
			}
			sample := media.Sample{Data: data, Duration: packetLength}
			if err := c.voice.WriteSample(sample); err != nil {
				return
			}
		case <-c.done:
			return
		}
	}
}

func (c *call) queue(message *livekit.SignalRequest) {
	select {
	case c.send <- message:
	case <-c.done:
	}
}

// write is the only function that writes to the socket, which allows only one writer at a time.
func (c *call) write() {
	ping := time.NewTicker(pingInterval)
	defer ping.Stop()
	for {
		var message *livekit.SignalRequest
		select {
		case message = <-c.send:
		case now := <-ping.C:
			message = &livekit.SignalRequest{Message: &livekit.SignalRequest_PingReq{
				PingReq: &livekit.Ping{Timestamp: now.UnixMilli()},
			}}
		case <-c.done:
			return
		}
		if err := write(c.conn, message); err != nil {
			// The reader also notices the end of the connection, and ends the call.
			return
		}
	}
}

func dial(url, token string) (*websocket.Conn, error) {
	header := http.Header{"Authorization": {"Bearer " + token}}
	conn, _, err := websocket.DefaultDialer.Dial(url, header)
	return conn, err
}

func write(conn *websocket.Conn, message proto.Message) error {
	data, err := proto.Marshal(message)
	if err != nil {
		return err
	}
	return conn.WriteMessage(websocket.BinaryMessage, data)
}

func read(conn *websocket.Conn, message proto.Message) error {
	_, data, err := conn.ReadMessage()
	if err != nil {
		return err
	}
	return proto.Unmarshal(data, message)
}
