// Command benchmarks measures Keyward against a raw limit or a peer in the
// same run: ours and theirs in turn, round by round, because machines are
// noisy and only a ratio of neighbours says anything. `make bench` prints the
// tables and writes benchmarks/out/results.json.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"
)

// A Result is one line of results.json.
type Result struct {
	Name    string  `json:"name"`
	Ours    float64 `json:"ours"`    // median over the rounds
	Other   float64 `json:"other"`   // the same of what it is held against
	Against string  `json:"against"` // what that is
	Unit    string  `json:"unit"`
	Ratio   float64 `json:"ratio"` // median of the rounds' ours/other
	Rounds  int     `json:"rounds"`

	worst float64 // worst ratio of any round
	goal  string
}

// A benchmark measures one or more names.
type benchmark struct {
	names []string
	run   func(context.Context, *bench) ([]Result, error)
}

// A bench is what a benchmark may use.
type bench struct {
	rounds int
	short  bool   // tiny data, to prove that it runs; the figures say nothing
	root   string // of the source tree
	dir    string // private, removed afterwards
	out    io.Writer
	// programs builds our programs, once in a run, and returns their folder.
	programs func() (string, error)
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 {
		if f, ok := helpers()[args[0]]; ok {
			if err := f(args[1:], stdout); err != nil {
				fmt.Fprintf(stderr, "benchmarks: %s: %v\n", args[0], err)
				return 1
			}
			return 0
		}
	}
	fs := flag.NewFlagSet("benchmarks", flag.ContinueOnError)
	fs.SetOutput(stderr)
	only := fs.String("run", "", "measure only names that match this regular expression")
	b := bench{out: stdout}
	fs.IntVar(&b.rounds, "rounds", 5, "rounds of each pair")
	fs.BoolVar(&b.short, "short", false, "tiny data: prove that everything runs")
	file := fs.String("o", filepath.Join("benchmarks", "out", "results.json"), "where the results go")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	match, err := regexp.Compile(*only)
	if err != nil || b.rounds < 1 || fs.NArg() > 0 {
		fmt.Fprintln(stderr, "benchmarks: -run must be a regular expression and -rounds at least 1; there are no arguments")
		return 2
	}
	results, err := b.measure(ctx, match)
	if werr := write(*file, results); werr != nil {
		fmt.Fprintln(stderr, "benchmarks:", werr)
		return 1
	}
	if err != nil {
		fmt.Fprintln(stderr, "benchmarks:", err)
		return 1
	}
	return 0
}

// measure runs every benchmark that has a wanted name. One that fails does not
// keep the others from being measured.
func (b bench) measure(ctx context.Context, match *regexp.Regexp) ([]Result, error) {
	var err error
	if b.root, err = sourceRoot(); err != nil {
		return nil, err
	}
	tools, err := os.MkdirTemp("", "keyward-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(tools) }() // in the system's temporary place anyway
	b.programs = sync.OnceValues(func() (string, error) { return buildPrograms(b.root, tools) })
	var results []Result
	var errs []error
	for _, m := range all() {
		if !slices.ContainsFunc(m.names, match.MatchString) || ctx.Err() != nil {
			continue
		}
		rs, err := b.one(ctx, m)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.names[0], err))
		}
		results = append(results, rs...)
	}
	return results, errors.Join(append(errs, ctx.Err())...)
}

func (b bench) one(ctx context.Context, m benchmark) (rs []Result, err error) {
	// Not in /tmp, which may be memory: what is measured writes to a disk.
	if b.dir, err = os.MkdirTemp("/var/tmp", "kwb-"); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	start := time.Now()
	if rs, err = m.run(ctx, &b); err != nil {
		return nil, err
	}
	for _, name := range m.names {
		if !slices.ContainsFunc(rs, func(r Result) bool { return r.Name == name }) {
			return rs, fmt.Errorf("no figure for %s", name)
		}
	}
	table(b.out, rs, time.Since(start))
	return rs, nil
}

func table(out io.Writer, rs []Result, took time.Duration) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "name\tours\tother\tunit\tratio\tworst\tgoal\tagainst")
	for _, r := range rs {
		fmt.Fprintf(w, "%s\t%.4g\t%.4g\t%s\t%.3f\t%.3f\t%s\t%s\n", r.Name, r.Ours, r.Other, r.Unit, r.Ratio, r.worst, r.goal, r.Against)
	}
	_ = w.Flush() // to a terminal or a pipe: nothing to do about it
	fmt.Fprintf(out, "%d rounds, %.0f s\n\n", rs[0].Rounds, took.Seconds())
}

func write(file string, results []Result) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

// A sample is what one run of one variant gives: one or more figures.
type sample []float64

type variant func(context.Context) (sample, error)

// interleave runs the variants in turn, A B C, C B A, A B C, so that drift
// hits all. The result is indexed by variant, figure and round.
func (b *bench) interleave(ctx context.Context, variants ...variant) ([][][]float64, error) {
	got := make([][][]float64, len(variants))
	for round := range b.rounds {
		for i := range variants {
			if round%2 == 1 {
				i = len(variants) - 1 - i
			}
			s, err := variants[i](ctx)
			if err != nil {
				return nil, fmt.Errorf("variant %d, round %d: %w", i+1, round+1, err)
			}
			if got[i] == nil {
				got[i] = make([][]float64, len(s))
			}
			for f, v := range s {
				got[i][f] = append(got[i][f], v)
			}
		}
	}
	return got, nil
}

// A question is what a pair of series shall answer.
type question struct {
	name, against, unit, goal string
	lessIsBetter              bool
}

// compare judges by the ratios of the rounds.
func (q question) compare(ours, other []float64) Result {
	ratios := make([]float64, len(ours))
	for i := range ours {
		ratios[i] = ours[i] / other[i]
	}
	worst := slices.Min(ratios)
	if q.lessIsBetter {
		worst = slices.Max(ratios)
	}
	return Result{Name: q.name, Ours: median(ours), Other: median(other), Against: q.against, Unit: q.unit,
		Ratio: median(ratios), Rounds: len(ours), worst: worst, goal: q.goal}
}

// limit holds a series against a fixed limit, where there is no rival.
func limit(name, unit string, ours []float64, most float64) Result {
	other := slices.Repeat([]float64{most}, len(ours))
	return question{name: name, against: "the limit", unit: unit, goal: "<= 1", lessIsBetter: true}.compare(ours, other)
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	if n%2 == 1 {
		return v[n/2]
	}
	return (v[n/2-1] + v[n/2]) / 2
}
