// Package deploy runs what deploy/ ships: the release, its image and its package, and the unit. What needs a cluster is given to an
// API server, and the rest is read by the programs and types that will read it.
package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const root = "../.."

func path(t *testing.T, parts ...string) string {
	t.Helper()
	absolute, err := filepath.Abs(filepath.Join(append([]string{root}, parts...)...))
	if err != nil {
		t.Fatal(err)
	}
	return absolute
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// The canary's binary: CANARY, or what `just deployment` builds.
func builtBinary() string {
	if file := os.Getenv("CANARY"); file != "" {
		return file
	}
	return filepath.Join(root, "target", "debug", "livekit-canary")
}

func binary(t *testing.T) string {
	t.Helper()
	file, err := filepath.Abs(builtBinary())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Fatalf("build the canary first (`just deployment`), or set CANARY: %v", err)
	}
	return file
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	output, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, output)
	}
	return string(output)
}

func command(program string, variables []string, args ...string) *exec.Cmd {
	command := exec.Command(program, args...)
	command.Env = variables
	return command
}

// An image's tag says which version it is.
func assertPinned(t *testing.T, image string) {
	t.Helper()
	_, tag, found := strings.Cut(image, ":")
	if !found || tag == "latest" || !strings.ContainsAny(tag, "0123456789") {
		t.Errorf("image %s is not pinned to a version", image)
	}
}
