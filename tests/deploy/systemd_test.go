package deploy

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Tenths: 0 is what can do nothing, 100 what may do all. A service with the defaults has 96.
const mostExposed = "15"

// The values of a key of the unit, in their order.
func unit(t *testing.T, key string) []string {
	t.Helper()
	var found []string
	for _, line := range strings.Split(read(t, path(t, "deploy", "systemd", "livekit-canary.service")), "\n") {
		if value, is := strings.CutPrefix(line, key+"="); is {
			found = append(found, value)
		}
	}
	return found
}

func TestUnitIsValidAndExposesLittle(t *testing.T) {
	// systemd looks for the binary in folders where it is only if it is installed.
	text := read(t, path(t, "deploy", "systemd", "livekit-canary.service"))
	text = strings.Replace(text, "ExecStart=livekit-canary", "ExecStart="+binary(t), 1)
	file := filepath.Join(t.TempDir(), "livekit-canary.service")
	write(t, file, text)
	if said := run(t, "systemd-analyze", "verify", "--man=no", file); strings.Contains(said, file) {
		t.Errorf("systemd finds fault with it:\n%s", said)
	}
	run(t, "systemd-analyze", "security", "--offline=true", "--threshold="+mostExposed, file)
}

// Starts what ExecStart says, with the environment and the credentials of the unit, and waits for what systemd would.
func TestExecStartStartsTheCanaryWhichSaysThatItIsReady(t *testing.T) {
	folder := t.TempDir()
	socket := filepath.Join(folder, "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	write(t, filepath.Join(folder, "canary.toml"), `
[http]
listen = "127.0.0.1:0"
[lifetime]
startup_delay = "10m"
shutdown_linger = "0s"
[projects.main]
url = "ws://127.0.0.1:9"
[targets.support]
agent_name = "support"
`)
	for _, credential := range unit(t, "LoadCredential") {
		name, _, _ := strings.Cut(credential, ":")
		write(t, filepath.Join(folder, name), "secret")
	}
	installed := strings.NewReplacer(
		"/etc/livekit-canary", folder,
		"%d", folder,
		"%S", folder,
	)
	variables := []string{"NOTIFY_SOCKET=" + socket, "WATCHDOG_USEC=30000000"}
	for _, variable := range unit(t, "Environment") {
		variables = append(variables, installed.Replace(variable))
	}
	words := strings.Fields(installed.Replace(unit(t, "ExecStart")[0]))
	canary := command(binary(t), variables, words[1:]...)
	canary.Stderr = os.Stderr
	if err := canary.Start(); err != nil {
		t.Fatal(err)
	}
	defer canary.Process.Kill()
	ended := make(chan error, 1)
	go func() {
		ended <- canary.Wait()
		// What it said before is read; nothing more comes.
		manager.SetReadDeadline(time.Now().Add(time.Second))
	}()
	if err := manager.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	for _, expected := range []string{"READY=1", "STOPPING=1"} {
		await(t, manager, expected)
		// The first is to be the last; a second one would end it at once.
		if expected == "READY=1" {
			if err := canary.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := <-ended; err != nil {
		t.Errorf("it didn't end well: %v", err)
	}
	if _, err := os.Stat(filepath.Join(folder, "livekit-canary")); err != nil {
		t.Errorf("its state is not in the state directory: %v", err)
	}
}

func await(t *testing.T, manager *net.UnixConn, expected string) {
	t.Helper()
	buffer := make([]byte, 4096)
	for {
		length, err := manager.Read(buffer)
		if err != nil {
			t.Fatalf("no %s: %v", expected, err)
		}
		if strings.Contains(string(buffer[:length]), expected) {
			return
		}
	}
}
