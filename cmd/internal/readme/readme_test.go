package readme

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const root = "../../.."

// block returns the first fenced block of a kind after a heading.
func block(t *testing.T, heading, kind string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(b), heading+"\n")
	if !ok {
		t.Fatalf("README.md has no heading %q", heading)
	}
	_, after, ok = strings.Cut(after, "```"+kind+"\n")
	text, _, end := strings.Cut(after, "\n```")
	if !ok || !end {
		t.Fatalf("README.md has no block %q after %q", kind, heading)
	}
	return text
}

// shell runs a script from the repository's root with its own home; what it
// leaves in the background is killed with its process group.
func shell(t *testing.T, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	home := t.TempDir()
	out, err := os.Create(filepath.Join(home, "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.CommandContext(ctx, "bash", "-eu", "-o", "pipefail", "-c", script)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "HOME="+home, "GOFLAGS=-buildvcs=false",
		"GOCACHE="+goEnv(t, "GOCACHE"), "GOMODCACHE="+goEnv(t, "GOMODCACHE"), "GOPATH="+goEnv(t, "GOPATH"))
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Run()
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // the service it started; gone already is fine
	text, rerr := os.ReadFile(out.Name())
	if err != nil || rerr != nil {
		t.Fatalf("%v, %v\n%s", err, rerr, text)
	}
	return string(text)
}

func goEnv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.Command("go", "env", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// TestByHand types the commands of "Try it by hand".
func TestByHand(t *testing.T) {
	out := shell(t, block(t, "## Try it by hand, nothing to install", "sh"))
	for _, want := range []string{"shop/system", "recovery", "serving on"} {
		if !strings.Contains(out, want) {
			t.Errorf("the output has no %q:\n%s", want, out)
		}
	}
}

// TestConfiguration checks the example of "With your HSM".
func TestConfiguration(t *testing.T) {
	name := filepath.Join(t.TempDir(), "kms.json")
	if err := os.WriteFile(name, []byte(block(t, "## With your HSM", "json")), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := shell(t, "go run ./cmd/keyward-kms check --config "+name); !strings.Contains(out, "ok") {
		t.Errorf("got %s", out)
	}
}

// TestLinks: every relative link of our documents leads somewhere.
func TestLinks(t *testing.T) {
	for _, doc := range []string{"README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "plugins/mariadb/README.md"} {
		b, err := os.ReadFile(filepath.Join(root, doc))
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range strings.Split(string(b), "](")[1:] {
			target, _, _ := strings.Cut(part, ")")
			target, _, _ = strings.Cut(target, "#")
			if target == "" || strings.Contains(target, "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(doc), target)); err != nil {
				t.Errorf("%s links to %s: %v", doc, target, err)
			}
		}
	}
}
