package archtest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// units are the systemd units that come with the programs, and the largest
// exposure that systemd-analyze may see in them, in tenths.
var units = map[string]int{
	"../../keyward-kms/keyward-kms.service":     15,
	"../../keyward-agent/keyward-agent.service": 25, // root, and sees all users
}

// TestUnits: systemd understands every line, and the hardening is what it was.
func TestUnits(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd here")
	}
	for file, most := range units {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			// The program is not installed here; everything else is judged as it is.
			name := filepath.Join(t.TempDir(), filepath.Base(file))
			start := regexp.MustCompile(`(?m)^ExecStart=/usr/bin/[a-z-]+`)
			if n := len(start.FindAll(text, -1)); n != 1 {
				t.Fatalf("%d programs, want 1", n)
			}
			if err := os.WriteFile(name, start.ReplaceAll(text, []byte("ExecStart=/bin/true")), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command(analyze, "verify", "--man=no", name).CombinedOutput()
			if said := bytes.TrimSpace(out); err != nil || bytes.Contains(said, []byte(filepath.Base(name))) {
				t.Errorf("verify: %v\n%s", err, said)
			}
			out, err = exec.Command(analyze, "security", "--offline=true", "--no-pager", "--threshold="+strconv.Itoa(most), name).CombinedOutput()
			if err != nil {
				t.Errorf("exposure above %d/10: %v\n%s", most, err, lastLines(out, 2))
			}
		})
	}
}

func lastLines(b []byte, n int) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
