package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The helpers are this program: so is the test binary, if it is asked to be.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		if _, ok := helpers()[os.Args[1]]; ok {
			main()
		}
	}
	os.Exit(m.Run())
}

// Every benchmark runs on tiny data; what it measures then says nothing.
func TestBenchmarksRun(t *testing.T) {
	require(t, "softhsm2-util", "sysbench", "mariadbd", "mariadb-install-db", "cc")
	file := filepath.Join(t.TempDir(), "results.json")
	var stdout, stderr strings.Builder
	if code := run(t.Context(), []string{"-short", "-rounds", "1", "-o", file}, &stdout, &stderr); code != 0 {
		t.Fatalf("exit status %d: %s\n%s", code, stderr.String(), stdout.String())
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var results []map[string]any
	if err := json.Unmarshal(text, &results); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range results {
		name, _ := r["name"].(string)
		names = append(names, name)
		for _, field := range []string{"ours", "other", "ratio", "rounds"} {
			if n, ok := r[field].(float64); !ok || n <= 0 {
				t.Errorf("%s: %s is %v, want a positive number", name, field, r[field])
			}
		}
		if len(r) != 7 || r["against"] == "" || r["unit"] == "" {
			t.Errorf("%s: fields %v", name, r)
		}
	}
	for _, want := range []string{"unwrap/grpc/64", "unwrap/batch", "unwrap/same", "cache/hit", "socket/get",
		"mariadb/oltp_write_only", "mariadb/oltp_read_write", "mariadb/page_crypt", "mariadb/page_crypt_cbc",
		"agent/rss", "kms/rss", "kms/start", "kms/start/softhsm", "kms/start/after_100k"} {
		if !slices.Contains(names, want) {
			t.Errorf("no result for %s among %v", want, names)
		}
	}
}

// require skips the test, or fails it in CI, if a program is missing.
func require(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		_, err := exec.LookPath(p)
		if err == nil || exists("/usr/sbin/"+p) {
			continue
		}
		if os.Getenv("KEYWARD_REQUIRE_INTEGRATION") == "1" {
			t.Fatalf("%s is not installed", p)
		}
		t.Skipf("%s is not installed", p)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func TestWrongUse(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-run", "("}, {"-nonsense"}, {"stray"}} {
		var out, errs strings.Builder
		if code := run(t.Context(), args, &out, &errs); code != 2 || errs.Len() == 0 {
			t.Errorf("run(%q) = %d, %q, want 2 and a message", args, code, errs.String())
		}
	}
}

// The order is reversed in every other round, and the figures stay with their
// variant.
func TestInterleave(t *testing.T) {
	var order strings.Builder
	clock := 0.0
	v := func(name string) variant {
		return func(context.Context) (sample, error) {
			order.WriteString(name)
			clock++
			return sample{clock, -clock}, nil
		}
	}
	b := bench{rounds: 3}
	got, err := b.interleave(t.Context(), v("a"), v("b"), v("c"))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := order.String(), "abccbaabc"; got != want {
		t.Errorf("order %s, want %s", got, want)
	}
	if want := []float64{3, 4, 9}; !slices.Equal(got[2][0], want) {
		t.Errorf("third variant got %v, want %v", got[2][0], want)
	}
	wrong := errors.New("wrong")
	_, err = b.interleave(t.Context(), v("a"), func(context.Context) (sample, error) { return nil, wrong })
	if !errors.Is(err, wrong) {
		t.Errorf("error %v, want %v", err, wrong)
	}
}

// The ratio is the median of the rounds' ratios, not the ratio of the medians.
func TestCompare(t *testing.T) {
	ours, other := []float64{10, 40, 30}, []float64{10, 20, 60}
	tests := []struct {
		less  bool
		worst float64
	}{{false, 0.5}, {true, 2}}
	for _, tt := range tests {
		r := question{name: "n", lessIsBetter: tt.less}.compare(ours, other)
		if r.Ours != 30 || r.Other != 20 || r.Ratio != 1 || r.Rounds != 3 || r.worst != tt.worst {
			t.Errorf("less is better %v: got %+v, want 30, 20, 1, 3 rounds, worst %v", tt.less, r, tt.worst)
		}
	}
}

func TestParsePages(t *testing.T) {
	const good = "ctr encrypt 1000 2000\nctr decrypt 1000 3000\ncbc encrypt 8000 9000\ncbc decrypt 2000 1000\n"
	got, err := parsePages([]byte(good), 1)
	if err != nil {
		t.Fatal(err)
	}
	if got["ctr"].ours.both[0] != 500_000 || got["ctr"].builtin.seal[0] != 500_000 || got["cbc"].builtin.both[0] != 100_000 {
		t.Errorf("got %+v and %+v", *got["ctr"], *got["cbc"])
	}
	for name, bad := range map[string]string{"no lines": "", "a line short": good[:len(good)-22], "words": "ctr encrypt fast slow\n",
		"wrong order": "ctr decrypt 1 1\nctr encrypt 1 1\ncbc encrypt 1 1\ncbc decrypt 1 1\n"} {
		if _, err := parsePages([]byte(bad), 1); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestProc(t *testing.T) {
	if mb, err := memory(os.Getpid(), "VmRSS"); err != nil || mb < 1 || mb > 10_000 {
		t.Errorf("memory: %v MB, %v", mb, err)
	}
	if _, err := memory(os.Getpid(), "VmNonsense"); err == nil {
		t.Error("a size that does not exist: no error")
	}
	own, err := ownCPU()
	if err != nil {
		t.Fatal(err)
	}
	proc, err := cpuTime(os.Getpid())
	if err != nil || (proc-own).Abs().Seconds() > 1 {
		t.Errorf("cpuTime: %v, %v; getrusage says %v", proc, err, own)
	}
	if _, err := cpuTime(1 << 30); err == nil {
		t.Error("no such process: no error")
	}
}
