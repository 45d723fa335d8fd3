package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Three targets, each on its own LiveKit server, which is the canary's sandbox.
const (
	healthy = "healthy"
	// Some rooms are ok; the agent, LiveKit and the plan fail the others.
	failing = "failing"
	// No agent joins.
	outage = "outage"
)

// Each fault occurs more than once, because on a busy machine another failure may occur first.
var faults = map[string][]string{
	healthy: nil,
	failing: {
		"room2:no_track", "room6:no_track", "room11:no_track",
		"room4:create_room=500", "room9:create_room=500",
		"room7:upgrade=429,retry_after=15s", "room13:upgrade=429,retry_after=15s",
	},
	outage: {"never_joins"},
}

// Short deadlines for targets that wait in vain; the defaults for the one that must not fail on a busy machine.
var deadlines = map[string]string{
	healthy: "",
	failing: `deadlines.track = "2s"`,
	outage:  `deadlines.join = "3s"`,
}

// How often batches start, and what the callers do. The one of the healthy target interrupts, which makes its rooms longer. Its first
// batch must end before the next one is due, which is after half an interval at the earliest.
var callers = map[string]string{
	healthy: `schedule.every = "40s"
caller = {silence = "300ms", interrupt = true}`,
	failing: `schedule.every = "12s"
caller.silence = "300ms"`,
	outage: `schedule.every = "12s"`,
}

// A Prometheus that scrapes a daemon.
type stack struct {
	prometheus string
}

// Starts one daemon and the Prometheus servers that scrape it, and returns them by version.
func start(t *testing.T) map[string]stack {
	t.Helper()
	servers := programs(t)
	daemon, settings := free(t), t.TempDir()
	text := fmt.Sprintf(`http.listen = "127.0.0.1:%d"
lifetime.startup_delay = "3s"
lifetime.shutdown_linger = "0s"
`, daemon)
	for name, faults := range faults {
		text += project(t, name, faults)
	}
	write(t, filepath.Join(settings, "canary.toml"), text)
	run(t, binary(t), "run", "--config", filepath.Join(settings, "canary.toml"))

	stacks := map[string]stack{}
	for version, program := range servers {
		stacks[version] = stack{scrape(t, program, daemon)}
	}
	return stacks
}

// The two versions of Prometheus that the dashboards must work with.
func programs(t *testing.T) map[string]string {
	t.Helper()
	output, err := exec.Command("../tests/rules/setup.sh").Output()
	if err != nil {
		t.Fatalf("tests/rules/setup.sh: %v", err)
	}
	programs := map[string]string{}
	for _, line := range strings.Fields(string(output)) {
		name, path, _ := strings.Cut(line, "=")
		if strings.HasPrefix(name, "PROMETHEUS") {
			programs[name] = path
		}
	}
	if len(programs) != 2 {
		t.Fatalf("setup.sh must print two programs: %s", output)
	}
	return programs
}

// Runs a Prometheus that scrapes the daemon on this port, and returns its address.
func scrape(t *testing.T, program string, daemon int) string {
	t.Helper()
	prometheus, folder := free(t), t.TempDir()
	rules, err := os.ReadFile("../deploy/prometheus/livekit-canary.rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	// The slow group would be evaluated once in the whole test.
	write(t, filepath.Join(folder, "rules.yml"), strings.ReplaceAll(string(rules), "interval: 2m\n", "interval: 5s\n"))
	write(t, filepath.Join(folder, "prometheus.yml"), fmt.Sprintf(`global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 5s}
rule_files: [rules.yml]
scrape_configs:
- job_name: canary
  static_configs:
  # One daemon as two instances, as Prometheus sees it for some time after a rollout.
  - targets: ['127.0.0.1:%[1]d', 'localhost:%[1]d']
    labels: {region: here}
`, daemon))
	run(t, program,
		"--config.file="+filepath.Join(folder, "prometheus.yml"),
		"--storage.tsdb.path="+filepath.Join(folder, "tsdb"),
		fmt.Sprintf("--web.listen-address=127.0.0.1:%d", prometheus))
	return fmt.Sprintf("http://127.0.0.1:%d", prometheus)
}

// The settings of a project and its target of the same name, on a sandbox with these faults.
func project(t *testing.T, name string, faults []string) string {
	t.Helper()
	args := []string{"sandbox", "--port", "0"}
	for _, fault := range faults {
		args = append(args, "--fault", fault)
	}
	access := bufio.NewScanner(run(t, binary(t), args...))
	keys := map[string]string{}
	for len(keys) < 3 && access.Scan() {
		key, value, _ := strings.Cut(access.Text(), "=")
		keys[key] = value
	}
	return fmt.Sprintf(`
[projects.%[1]s]
url = %[2]q
api_key = %[3]q
api_secret = %[4]q
budget.agent_time_per_day = "20h"
[targets.%[1]s]
project = %[1]q
agent_name = "demo"
batch = {rooms = 2, hold = "7s", ramp = "interval", interval = "100ms"}
late_agent_window = "1s"
%[5]s
%[6]s
`, name, keys["LIVEKIT_URL"], keys["LIVEKIT_API_KEY"], keys["LIVEKIT_API_SECRET"], deadlines[name], callers[name])
}

func binary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("CANARY")
	if path == "" {
		path = "../target/release/livekit-canary"
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("build the canary first, or set CANARY to it: %v", err)
	}
	return path
}

// Runs a program until the test ends, and returns its stdout.
func run(t *testing.T, program string, args ...string) io.Reader {
	t.Helper()
	command := exec.Command(program, args...)
	// Without the LIVEKIT_ variables of the environment.
	command.Env = []string{"PATH=" + os.Getenv("PATH")}
	stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	command.Stderr = stderr
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			output, _ := os.ReadFile(stderr.Name())
			t.Logf("%s %s\n%s", program, args[0], output[max(0, len(output)-2000):])
		}
		_ = command.Process.Signal(syscall.SIGTERM)
		killer := time.AfterFunc(10*time.Second, func() { _ = command.Process.Kill() })
		_ = command.Wait()
		killer.Stop()
	})
	return stdout
}

func free(t *testing.T) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Sends a request to Prometheus' API, and decodes the data of its response.
func (stack stack) request(path string, values url.Values, data any) error {
	client := http.Client{Timeout: 10 * time.Second}
	response, err := client.PostForm(stack.prometheus+path, values)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	whole := struct {
		Error string
		Data  any
	}{Data: data}
	if err := json.NewDecoder(response.Body).Decode(&whole); err != nil {
		return fmt.Errorf("%s: %s: %w", path, response.Status, err)
	}
	if whole.Error != "" {
		return fmt.Errorf("%s", whole.Error)
	}
	return nil
}
