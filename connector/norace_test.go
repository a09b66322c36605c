//go:build !race

package connector_test

// raceDetector: its shadow memory makes sizes meaningless.
const raceDetector = false
