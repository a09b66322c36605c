package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/term"

	"github.com/keyward/keyward/connector"
)

// A table collects what people read; columns are aligned when it ends.
type table struct{ w *tabwriter.Writer }

// row adds one line of cells.
func (t *table) row(cells ...any) {
	s := make([]string, len(cells))
	for i, c := range cells {
		s[i] = fmt.Sprint(c)
		if s[i] == "" {
			s[i] = "-"
		}
	}
	fmt.Fprintln(t.w, strings.Join(s, "\t"))
}

// line adds text that takes no part in the alignment.
func (t *table) line(format string, args ...any) {
	t.w.Flush() //nolint:errcheck // emit reports the writer's error
	fmt.Fprintf(t.w, format+"\n", args...)
	t.w.Flush() //nolint:errcheck // as above
}

// emit prints a result: v as JSON, or what people fills in.
func (a *app) emit(v any, people func(*table)) error {
	if a.json {
		e := json.NewEncoder(a.out)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	if people == nil {
		return nil
	}
	t := &table{a.plain()}
	people(t)
	return t.w.Flush()
}

// plain aligns columns on standard output.
func (a *app) plain() *tabwriter.Writer { return tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0) }

// note tells people how it goes on, on standard error and never with --json.
func (a *app) note(format string, args ...any) {
	if !a.json {
		fmt.Fprintf(a.err, format+"\n", args...)
	}
}

// when formats a time for people; the zero time is a dash.
func when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

// orDash keeps empty cells visible.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// isTerminal reports whether v is a terminal.
func isTerminal(v any) bool {
	f, ok := v.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// A meter shows progress on a terminal: items, rate and time left. Into a pipe
// it writes nothing.
type meter struct {
	w     io.Writer // nil: quiet
	what  string
	begin time.Time
	last  time.Time
	now   func() time.Time
	base  int // items that were done before the begin
	shown bool
}

// meterPause bounds how often the line is redrawn.
const meterPause = 200 * time.Millisecond

func (a *app) meter(what string) *meter {
	m := &meter{what: what, now: time.Now, begin: time.Now(), base: -1}
	if !a.json && isTerminal(a.err) {
		m.w = a.err
	}
	return m
}

// at shows that done of total items are through.
func (m *meter) at(p connector.Progress) {
	done, total := p.Done, p.Total
	if m.w == nil {
		return
	}
	now := m.now()
	if m.base < 0 {
		m.base, m.begin = done, now
	}
	if done < total && now.Sub(m.last) < meterPause {
		return
	}
	m.last, m.shown = now, true
	fmt.Fprintf(m.w, "\r\x1b[K%s: %s", m.what, m.text(done, total, now))
}

func (m *meter) text(done, total int, now time.Time) string {
	s := fmt.Sprintf("%d of %d", done, total)
	took := now.Sub(m.begin).Seconds()
	if took <= 0 || done <= m.base {
		return s
	}
	rate := float64(done-m.base) / took
	s += fmt.Sprintf(", %.0f/s", rate)
	if done < total {
		left := time.Duration(float64(total-done) / rate * float64(time.Second))
		s += fmt.Sprintf(", %s left", left.Round(time.Second))
	}
	return s
}

// end leaves the cursor on a line of its own.
func (m *meter) end() {
	if m.shown {
		fmt.Fprintln(m.w)
	}
}
